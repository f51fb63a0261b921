{{/* Name of the chart's objects: the release's name, with the chart's unless it is in there. */}}
{{- define "tempflow.fullname" -}}
{{- $chart := .Values.nameOverride | default .Chart.Name -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else if contains $chart .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $chart | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change, because Deployments select by them. */}}
{{- define "tempflow.selectorLabels" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* Labels of every object. */}}
{{- define "tempflow.labels" -}}
{{ include "tempflow.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: tempflow
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tempflow.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "tempflow.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* The operator's image; without one, the installation stops here and says what to do. */}}
{{- define "tempflow.image" -}}
{{- if or (not .Values.image.repository) (not (or .Values.image.tag .Values.image.digest)) -}}
{{- include "tempflow.missingImage" . | fail -}}
{{- else if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository .Values.image.tag -}}
{{- end -}}
{{- end -}}

{{- define "tempflow.missingImage" }}

image.repository and image.tag are required: this project publishes no images. Build both, push
them to a registry that the cluster reads, and name them. In the project's folder:

  export IMAGE_REPOSITORY=REGISTRY/PROJECT
  make images push-images
  helm upgrade --install {{ .Release.Name }} charts/tempflow \
    --namespace {{ .Release.Namespace }} --create-namespace \
    --set image.repository=$IMAGE_REPOSITORY/tempflow-operator \
    --set image.tag={{ .Chart.AppVersion }} \
    --set trainerImage=$IMAGE_REPOSITORY/tempflow-trainer:{{ .Chart.AppVersion }}
{{ end -}}

{{/* What meets the restricted Pod Security profile, for the pod and for its container. */}}
{{- define "tempflow.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "tempflow.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The pod of `helm test` is no operator: nothing that selects operators may select it. */}}
{{- define "tempflow.testLabels" -}}
{{ include "tempflow.labels" . | replace "component: operator" "component: test" }}
{{- end -}}
