"""What all pods of an attempt have in common, ranks and reward servers: the restricted profile, the
folders that can be written to, the caches and the Secret."""

from tempflow_api.pods import ModelCache
from tempflow_api.v1alpha1 import Compute
from tempflow_operator.desired.attempt import Manifest
from tempflow_operator.settings import Pods

# The user of the trainer's image; any other number than root's works as well.
USER = 65532
WORK_DIR = "/var/tempflow"
HOME = "/home/tempflow"
CACHE_DIR = "/var/cache/tempflow"

# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
POD_SECURITY: Manifest = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def environment(cache: ModelCache) -> dict[str, str]:
    """Variables that any of our programs needs in a pod."""
    values = {
        "HOME": HOME,
        # The user's number has no name in most images, and Python and torch ask for one.
        "USER": "tempflow",
    }
    return {**values, "HF_HOME": f"{CACHE_DIR}/huggingface"} if cache_volumes(cache) else values


def secret_environment(compute: Compute) -> Manifest:
    """Only the Secret's name: the kubelet reads it, the operator may not."""
    if compute.secret_name is None:
        return {}
    return {"envFrom": [{"secretRef": {"name": compute.secret_name}}]}


def folders() -> tuple[list[Manifest], list[Manifest]]:
    """Mounts and volumes for what is written outside of /dev/shm."""
    places = {"work": WORK_DIR, "home": HOME, "tmp": "/tmp"}  # noqa: S108 - volumes of the pod
    mounts = [{"name": name, "mountPath": path} for name, path in places.items()]
    return mounts, [{"name": name, "emptyDir": {}} for name in places]


def cache_mounts(cache: ModelCache) -> list[Manifest]:
    return [{"name": "models", "mountPath": CACHE_DIR}] if cache_volumes(cache) else []


def cache_volumes(cache: ModelCache) -> list[Manifest]:
    """None where the job asks for no cache: models then lie with the rest of what a pod writes."""
    if cache.persistent_volume_claim is not None:
        claim = {"claimName": cache.persistent_volume_claim}
        return [{"name": "models", "persistentVolumeClaim": claim}]
    if cache.host_path is not None:
        path = {"path": cache.host_path, "type": "Directory"}
        return [{"name": "models", "hostPath": path}]
    if cache.empty_dir is not None:
        return [{"name": "models", "emptyDir": {"sizeLimit": cache.empty_dir}}]
    return []


def tolerations(settings: Pods) -> list[Manifest]:
    """Nodes that are not ready are left soon."""
    return [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": settings.unreachable_toleration,
        }
        for state in ("not-ready", "unreachable")
    ]


def spread(labels: dict[str, str]) -> list[Manifest]:
    """Preferred, not required: two pods on one node are better than a job that waits."""
    return [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": labels},
        }
    ]
