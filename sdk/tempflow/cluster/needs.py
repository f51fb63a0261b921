"""What a manifest names of its cluster, and what each has to be. Of a Secret only the names of its
keys are looked at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tempflow_api.v1alpha1 import JobSpec

Raw = dict[str, Any]

_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_SHARED = {"ReadWriteMany", "ReadOnlyMany"}


def _nothing(_object: Raw) -> str:
    return ""


@dataclass(frozen=True)
class Named:
    """An object that has to be there."""

    word: str
    name: str
    field: str
    """Of the manifest, which names it."""
    path: str
    """At the API server, without the name."""
    wrong: Callable[[Raw], str] = _nothing
    """What is wrong with the object; empty if nothing is."""

    def __str__(self) -> str:
        return f"{self.word} {self.name} ({self.field})"


def named(spec: JobSpec, namespace: str) -> Iterator[Named]:
    """In the order in which a pod needs them."""
    core = f"/api/v1/namespaces/{namespace}"
    compute, asked = spec.compute, spec.compute.pod_template
    of_template = "spec.compute.podTemplate"

    def secret(name: str, field: str, wrong: Callable[[Raw], str] = _nothing) -> Named:
        return Named("Secret", name, field, f"{core}/secrets", wrong)

    def config(name: str, field: str) -> Named:
        return Named("ConfigMap", name, field, f"{core}/configmaps")

    def claim(name: str, field: str, wrong: Callable[[Raw], str]) -> Named:
        path = f"{core}/persistentvolumeclaims"
        return Named("PersistentVolumeClaim", name, field, path, wrong)

    if asked.priority_class_name:
        path = "/apis/scheduling.k8s.io/v1/priorityclasses"
        field = f"{of_template}.priorityClassName"
        yield Named("PriorityClass", asked.priority_class_name, field, path)
    if asked.runtime_class_name:
        path, field = "/apis/node.k8s.io/v1/runtimeclasses", f"{of_template}.runtimeClassName"
        yield Named("RuntimeClass", asked.runtime_class_name, field, path)
    if asked.service_account_name:
        path, field = f"{core}/serviceaccounts", f"{of_template}.serviceAccountName"
        yield Named("ServiceAccount", asked.service_account_name, field, path)
    for name in asked.image_pull_secrets:
        yield secret(name, f"{of_template}.imagePullSecrets")
    if compute.secret_name:
        by_account = asked.service_account_name is not None
        keys = _nothing if by_account else _lacks_credentials
        yield secret(compute.secret_name, "spec.compute.secretName", keys)
    if spec.data.prompts_config_map:
        yield config(spec.data.prompts_config_map, "spec.data.promptsConfigMap")
    if spec.model_cache.persistent_volume_claim:
        modes = _is_lost if compute.nodes == 1 else _is_not_shared
        field = "spec.modelCache.persistentVolumeClaim"
        yield claim(spec.model_cache.persistent_volume_claim, field, modes)
    for volume in asked.volumes:
        field = f"{of_template}.volumes"
        if volume.secret:
            yield secret(volume.secret, field)
        elif volume.config_map:
            yield config(volume.config_map, field)
        elif volume.persistent_volume_claim:
            yield claim(volume.persistent_volume_claim, field, _is_lost)


def storage_class(claim: Raw) -> Named | None:
    """Which a claim waits for that has no volume yet."""
    name = claim["spec"].get("storageClassName")
    if claim.get("status", {}).get("phase") != "Pending" or not name:
        return None
    of = f"of PersistentVolumeClaim {claim['metadata']['name']}"
    return Named("StorageClass", name, of, "/apis/storage.k8s.io/v1/storageclasses")


def _lacks_credentials(secret: Raw) -> str:
    missing = [key for key in _CREDENTIALS if key not in (secret.get("data") or {})]
    return f"has no key {' and no '.join(missing)}" if missing else ""


def _is_lost(claim: Raw) -> str:
    phase = claim.get("status", {}).get("phase")
    return "has lost its volume" if phase == "Lost" else ""


def _is_not_shared(claim: Raw) -> str:
    modes = claim["spec"].get("accessModes") or []
    if _SHARED.isdisjoint(modes):
        return f"is {', '.join(modes)}, and several nodes need ReadWriteMany"
    return _is_lost(claim)
