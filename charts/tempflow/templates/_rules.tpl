{{/* What the operator may do in the namespaces that it works in. No Secret, no workload but Jobs and the
servers of rewards. */}}
{{- define "tempflow.operatorRules" -}}
# Deleted when their time to live is over.
- apiGroups: [tempflow.dev]
  resources: [tempflowgrpojobs]
  verbs: [get, list, watch, delete]
- apiGroups: [tempflow.dev]
  resources: [tempflowgrpojobs/status]
  verbs: [patch]
{{- if .Values.rbac.ownerReferencesPermission }}
- apiGroups: [tempflow.dev]
  resources: [tempflowgrpojobs/finalizers]
  verbs: [update]
{{- end }}
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
# Of rewards with `placement: service`; their pods tell what there is to watch.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [services, configmaps]
  verbs: [get, list, create, delete]
# One for each attempt of a job that asks for it.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, create, delete]
{{- with .Values.gangScheduling }}
- apiGroups: [{{ ternary "scheduling.volcano.sh" "scheduling.x-k8s.io" (eq . "volcano") }}]
  resources: [podgroups]
  verbs: [get, list, create, delete]
{{- end }}
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

{{/* What a person sees who looks after a job. */}}
{{- define "tempflow.viewRules" -}}
- apiGroups: [tempflow.dev]
  resources: [tempflowgrpojobs, tempflowgrpojobs/status]
  verbs: [get, list, watch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [pods, pods/log, configmaps, events]
  verbs: [get, list, watch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [get, list, watch]
{{- end -}}

{{/* What a person does beside looking: run jobs, and bring prompts along in a ConfigMap. */}}
{{- define "tempflow.editRules" -}}
{{ include "tempflow.viewRules" . }}
- apiGroups: [tempflow.dev]
  resources: [tempflowgrpojobs]
  verbs: [create, update, patch, delete, deletecollection]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create, update, patch, delete]
{{- end -}}

{{/* What reading a store from inside takes (--via-cluster, doctor --probe). It is no part of edit:
     whoever may create any pod may do more than run jobs. Kubernetes' own edit has it. */}}
{{- define "tempflow.viaClusterRules" -}}
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, create, delete]
# A WebSocket begins with a GET; newer API servers also ask for create.
- apiGroups: [""]
  resources: [pods/portforward]
  verbs: [get, create]
{{- end -}}
