"""The pod that reads a store for somebody outside: what it is, and what keeps it from starting.

It sees what the job's own pods see, because it has their image, Secret, service account, variables
and kinds of nodes; it has no GPU, no model and no work.
"""

from collections.abc import Sequence
from typing import Any

from tempflow_api import naming
from tempflow_api.pods import PodTemplate, Volume
from tempflow_api.storage import Checkpoint
from tempflow_api.v1alpha1 import JobSpec

Raw = dict[str, Any]

ACTIVE_SECONDS = 6 * 3600
"""It ends by itself after ten minutes without a question; this is for one that cannot."""
NAME = "tempflow-reader-"
PULL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_USER = 65532
_HOME = "/home/tempflow"


def manifest(spec: JobSpec, store: Checkpoint, image: str, owner: Raw | None) -> Raw:
    """The pod; ``owner`` is the job with which it is deleted at the latest."""
    asked = spec.compute.pod_template
    metadata: Raw = {
        "generateName": NAME,
        "labels": {**asked.labels, **labels(owner)},
        "annotations": dict(asked.annotations),
    }
    if owner is not None:
        identity = {key: owner["metadata"][key] for key in ("name", "uid")}
        reference = {"apiVersion": naming.API_VERSION, "kind": naming.KIND, **identity}
        metadata["ownerReferences"] = [reference]
    pod = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": ACTIVE_SECONDS,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, store, image)],
        "volumes": [
            *({"name": name, "emptyDir": {}} for name in ("home", "tmp")),
            *map(_volume, _volumes(asked)),
        ],
        **_placement(asked),
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}


def labels(owner: Raw | None) -> dict[str, str]:
    """Of the readers of a job, or of one that is not there yet."""
    job = {naming.LABEL_JOB_NAME: owner["metadata"]["name"]} if owner is not None else {}
    return {"app.kubernetes.io/name": "tempflow", naming.LABEL_ROLE: naming.ROLE_READER, **job}


def _container(spec: JobSpec, store: Checkpoint, image: str) -> Raw:
    asked = spec.compute.pod_template
    described = store.model_dump_json(by_alias=True, include={"uri", "endpoint_url", "region"})
    values = {"HOME": _HOME, "USER": "tempflow", naming.ENV_STORE: described}
    values = {**{variable.name: variable.value for variable in asked.env}, **values}
    container: Raw = {
        "name": naming.ROLE_READER,
        "image": image,
        "command": ["python", "-m", naming.READER_MODULE],
        "env": [{"name": name, "value": value} for name, value in values.items()],
        # Eight ranges of 8 MiB at a time, and the interpreter.
        "resources": {
            "requests": {"cpu": "100m", "memory": "256Mi"},
            "limits": {"cpu": "2", "memory": "1Gi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "home", "mountPath": _HOME},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of this pod alone
            *(
                {"name": _name(one), "mountPath": one.mount_path, "readOnly": True}
                for one in _volumes(asked)
            ),
        ],
    }
    if spec.compute.secret_name is not None:
        container["envFrom"] = [{"secretRef": {"name": spec.compute.secret_name}}]
    return container


def _volumes(asked: PodTemplate) -> list[Volume]:
    """Credentials and authorities may lie in these; nothing for the store does in the others."""
    return [one for one in asked.volumes if one.config_map is not None or one.secret is not None]


def _name(volume: Volume) -> str:
    return f"extra-{volume.name}"


def _volume(volume: Volume) -> Raw:
    if volume.secret is not None:
        return {"name": _name(volume), "secret": {"secretName": volume.secret}}
    return {"name": _name(volume), "configMap": {"name": volume.config_map}}


def _placement(asked: PodTemplate) -> Raw:
    """The nodes that the job may use: a node may be what gives access to the store."""
    fields: Raw = {
        "nodeSelector": dict(asked.node_selector),
        "tolerations": [
            one.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            for one in asked.tolerations
        ],
        "serviceAccountName": asked.service_account_name,
        "imagePullSecrets": [{"name": name} for name in asked.image_pull_secrets],
    }
    if asked.node_requirements:
        expressions = [
            one.model_dump(mode="json", by_alias=True) for one in asked.node_requirements
        ]
        terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
        required = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
        fields["affinity"] = {"nodeAffinity": required}
    return {name: value for name, value in fields.items() if value}


def image_of(pods: Sequence[Raw]) -> str | None:
    """The trainer's image in the newest of a job's pods."""
    for pod in sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"], reverse=True):
        for container in pod["spec"]["containers"]:
            if container["name"] == naming.TRAINER_CONTAINER:
                return str(container["image"])
    return None


def runs(pod: Raw) -> bool:
    return any("running" in status["state"] for status in _statuses(pod))


def ended(pod: Raw) -> str:
    """Why it will not answer any more; empty as long as it may."""
    status = pod.get("status", {})
    for one in _statuses(pod):
        over = one["state"].get("terminated")
        if over is not None:
            said = str(over.get("message") or over.get("reason") or "").strip().splitlines()
            # An interpreter's complaint has its point in the last line.
            return f"exit code {over.get('exitCode')}: {said[-1] if said else 'it said nothing'}"
    if status.get("phase") in ("Failed", "Succeeded"):
        return str(status.get("message") or status.get("reason") or status["phase"])
    if "deletionTimestamp" in pod["metadata"]:
        return "somebody has deleted it"
    return ""


def refused(pod: Raw) -> str:
    """What keeps it from starting and will not pass by itself; empty if nothing does."""
    for one in _statuses(pod):
        waiting = one["state"].get("waiting") or {}
        reason, said = waiting.get("reason", ""), waiting.get("message", "")
        if reason in PULL_REASONS:
            return (
                f"the image {one['image']} cannot be pulled ({reason}: {said}): name another one "
                "with --image"
            )
        if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
            return f"{reason}: {said}: correct the job's spec.compute, or create what is missing"
    return ""


def waits_for(pod: Raw) -> str:
    """Why it has not started yet, in one line."""
    for one in pod.get("status", {}).get("conditions") or []:
        if one["type"] == "PodScheduled" and one["status"] == "False":
            return f"no node takes it: {one.get('message', one.get('reason', ''))}"
    for one in _statuses(pod):
        waiting = one["state"].get("waiting") or {}
        return str(waiting.get("reason", "it is starting"))
    return "it is not scheduled yet"


def _statuses(pod: Raw) -> list[Raw]:
    return pod.get("status", {}).get("containerStatuses") or []
