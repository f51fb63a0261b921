"""Objects that an operator and kubelets would write, for tests of the client alone."""

from pathlib import Path
from typing import Any

from tempflow import Manifest, manifest
from tempflow_api import naming
from tempflow_api.conditions import ConditionType
from tests.cluster.apiserver import ApiServer
from tests.cluster.kubectl import JsonObject
from tests.cluster.kubelet import Kubelet, Log
from tests.cluster.project_images import ROOT

WHEN = "2026-01-31T12:00:00Z"


def digits(name: str, **values: object) -> Manifest:
    """The example, as a user would submit it."""
    fields = {"metadata.name": name, "spec.checkpoint.uri": "s3://bucket/runs", **values}
    overrides = [f"{key}={value}" for key, value in fields.items()]
    return manifest.read(str(ROOT / "examples/digits.yaml"), overrides)


def condition(kind: ConditionType, reason: str, message: str = "", *, true: bool = True) -> Any:
    return {
        "type": str(kind),
        "status": "True" if true else "False",
        "reason": reason,
        "message": message,
        "lastTransitionTime": WHEN,
    }


def status(phase: str, *conditions: Any, **more: Any) -> JsonObject:
    return {"phase": phase, "conditions": list(conditions), **more}


SUCCEEDED = status(
    "Succeeded",
    condition(ConditionType.SUCCEEDED, "Completed", "all epochs are trained"),
    condition(ConditionType.FINISHED, "Succeeded"),
    attempt=1,
)
FAILED = status(
    "Failed",
    condition(ConditionType.FAILED, "PermanentFailure", "exit code 81: a reward failed"),
    condition(ConditionType.FINISHED, "Failed"),
    attempt=1,
)


def set_status(api: ApiServer, name: str, value: JsonObject) -> None:
    api.write_status(naming.PLURAL, name, value)


def add_node(api: ApiServer, kubelet: Kubelet, name: str = "node-1") -> None:
    api.create(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet.port}},
            },
        }
    )


def add_pod(
    api: ApiServer, kubelet: Kubelet, job: str, uid: str, *, rank: int = 0, attempt: int = 1
) -> tuple[str, Log]:
    """A running pod of the job; its name and its log."""
    name = f"{job}-a{attempt}-{rank}-abcde"
    log = kubelet.logs[name] = Log()
    api.create(pod_of(job, uid, rank=rank, attempt=attempt))
    return name, log


RUNNING_POD: JsonObject = {"running": {"startedAt": WHEN}}


def pod_of(
    job: str,
    uid: str,
    *,
    rank: int = 0,
    attempt: int = 1,
    node: str = "node-1",
    state: JsonObject = RUNNING_POD,
    phase: str = "Running",
) -> JsonObject:
    """As the Job controller and a kubelet would have made it."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{job}-a{attempt}-{rank}-abcde",
            "namespace": "default",
            "labels": {
                naming.LABEL_JOB_UID: uid,
                naming.LABEL_JOB_NAME: job,
                naming.LABEL_ATTEMPT: str(attempt),
                "batch.kubernetes.io/job-completion-index": str(rank),
            },
        },
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [{"name": "trainer", "image": "localhost/none"}],
        },
        "status": pod_status(phase, state),
    }


def pod_status(phase: str, state: JsonObject) -> JsonObject:
    container = {
        "name": "trainer",
        "image": "localhost/none",
        "imageID": "",
        "ready": phase == "Running",
        "restartCount": 0,
        "state": state,
    }
    return {"phase": phase, "containerStatuses": [container]}


def end_pod(api: ApiServer, name: str, log: Log) -> None:
    ended = {"terminated": {"exitCode": 0, "startedAt": WHEN, "finishedAt": WHEN}}
    api.write_status("Pod", name, pod_status("Succeeded", ended))
    log.end()


def here(path: str) -> Path:
    return ROOT / path
