"""What a job asks of its pods, merged into their template as a strategic merge patch would be."""

from typing import Any

from tempflow_api.pods import PodTemplate, Volume
from tempflow_operator.desired.attempt import Manifest

# Which field tells the entries of a list apart. An entry of the patch replaces or extends the one
# of the same name; a list that is not named here is extended, and nothing in it is replaced.
# https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/
_MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "volumes": "name",
}


def merged(base: Any, patch: Any, field: str = "") -> Any:
    """``base`` with ``patch`` merged into it; neither is changed."""
    if isinstance(base, dict) and isinstance(patch, dict):
        common = {key: merged(base[key], patch[key], key) for key in base.keys() & patch.keys()}
        return {**base, **patch, **common}
    if isinstance(base, list) and isinstance(patch, list):
        return _merged_lists(base, patch, _MERGE_KEYS.get(field))
    return patch


def _merged_lists(base: list[Any], patch: list[Any], key: str | None) -> list[Any]:
    if key is None:
        return [*base, *patch]
    patches = {entry[key]: entry for entry in patch}
    kept = [
        merged(entry, patches[entry[key]]) if entry[key] in patches else entry for entry in base
    ]
    known = {entry[key] for entry in base}
    return [*kept, *(entry for name, entry in patches.items() if name not in known)]


def with_overrides(
    template: Manifest, asked: PodTemplate, *, container: str, together: dict[str, str] | None
) -> Manifest:
    """The pod template with what the job asks for beyond it.

    ``container`` is the one that is meant, ``together`` the labels of the pods that ``sameDomain``
    keeps together; None where it does not apply.
    """
    metadata = {"labels": dict(asked.labels), "annotations": dict(asked.annotations)}
    patch = {
        "metadata": {name: value for name, value in metadata.items() if value},
        "spec": _spec(asked, container, together),
    }
    result: Manifest = merged(template, patch)
    return result


def _spec(asked: PodTemplate, name: str, together: dict[str, str] | None) -> Manifest:
    fields: Manifest = {
        "nodeSelector": dict(asked.node_selector),
        "affinity": _affinity(asked, together),
        "tolerations": [
            toleration.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            for toleration in asked.tolerations
        ],
        "priorityClassName": asked.priority_class_name,
        "serviceAccountName": asked.service_account_name,
        "schedulerName": asked.scheduler_name,
        "runtimeClassName": asked.runtime_class_name,
        "imagePullSecrets": [{"name": name} for name in asked.image_pull_secrets],
        "volumes": [_volume(volume) for volume in asked.volumes],
    }
    container: Manifest = {
        "env": [variable.model_dump() for variable in asked.env],
        "volumeMounts": [
            {
                "name": _name(volume),
                "mountPath": volume.mount_path,
                **({"readOnly": True} if volume.read_only else {}),
            }
            for volume in asked.volumes
        ],
    }
    container = {name: value for name, value in container.items() if value}
    if container:
        fields["containers"] = [{"name": name, **container}]
    return {name: value for name, value in fields.items() if value}


def _affinity(asked: PodTemplate, together: dict[str, str] | None) -> Manifest:
    affinity: Manifest = {}
    if asked.node_requirements:
        expressions = [
            requirement.model_dump(mode="json", by_alias=True)
            for requirement in asked.node_requirements
        ]
        affinity["nodeAffinity"] = {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": expressions}]
            }
        }
    if asked.same_domain is not None and together is not None:
        term = {"topologyKey": asked.same_domain, "labelSelector": {"matchLabels": together}}
        affinity["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    return affinity


def _name(volume: Volume) -> str:
    """Not one of the operator's own."""
    return f"extra-{volume.name}"


def _volume(volume: Volume) -> Manifest:
    if volume.persistent_volume_claim is not None:
        claim = {"claimName": volume.persistent_volume_claim, "readOnly": volume.read_only}
        return {"name": _name(volume), "persistentVolumeClaim": claim}
    if volume.config_map is not None:
        return {"name": _name(volume), "configMap": {"name": volume.config_map}}
    if volume.secret is not None:
        return {"name": _name(volume), "secret": {"secretName": volume.secret}}
    return {"name": _name(volume), "emptyDir": {"sizeLimit": volume.empty_dir}}
