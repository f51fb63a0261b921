"""The Indexed Job of one attempt: one pod a node, each with a rank, all of which fail together."""

import json

from tempflow_api import naming
from tempflow_api.errors import ASKED_TO_STOP, PERMANENT, ExitCode
from tempflow_api.v1alpha1 import Compute
from tempflow_operator.desired import sandbox
from tempflow_operator.desired.attempt import AttemptOf, Manifest
from tempflow_operator.desired.config import JOB_FILE, PROMPTS_DIR
from tempflow_operator.desired.gang import SCHEDULERS, in_group
from tempflow_operator.desired.network import variables
from tempflow_operator.desired.overrides import with_overrides
from tempflow_operator.desired.quantities import total_bytes
from tempflow_operator.desired.rewards import endpoints
from tempflow_operator.settings import Pods

# https://kueue.sigs.k8s.io/docs/tasks/run/jobs/
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

_CONFIG_DIR = "/etc/tempflow"


def workers(attempt: AttemptOf, settings: Pods) -> Manifest:
    """Any failed pod fails the Job; the Job controller then stops the others, and reports Failed
    only when all of them have ended."""
    nodes = attempt.spec.compute.nodes
    queue = attempt.spec.run_policy.queue
    template = {"metadata": {"labels": attempt.labels()}, "spec": _pod(attempt, settings)}
    template = with_overrides(
        template,
        attempt.spec.compute.pod_template,
        container=naming.TRAINER_CONTAINER,
        together=attempt.ranks(),
    )
    scheduler = SCHEDULERS.get(settings.gang_scheduler)
    if scheduler is not None:
        template = in_group(template, attempt, scheduler)
    metadata = attempt.metadata()
    if queue is not None:
        metadata["labels"] = {**metadata["labels"], QUEUE_LABEL: queue}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            # Set once, here, so that no pod starts before the queue has seen the Job. From then on
            # it belongs to the queue; without one nobody sets it.
            **({"suspend": True} if queue is not None else {}),
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules(queued=queue is not None)},
            "template": template,
        },
    }


def _failure_rules(*, queued: bool) -> list[Manifest]:
    """Every rule fails the Job, as a failure without rule does. They make the Job's condition say
    which pod ended and how, which outlives the pod.

    A queue that takes the pods back asks them to stop, too, and that must not fail the Job.
    """
    return [
        _exit_codes(sorted(int(code) for code in {*PERMANENT, ExitCode.PREFLIGHT})),
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        *([] if queued else [_exit_codes(sorted(ASKED_TO_STOP))]),
    ]


def _exit_codes(codes: list[int]) -> Manifest:
    return {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": naming.TRAINER_CONTAINER,
            "operator": "In",
            "values": codes,
        },
    }


def _pod(attempt: AttemptOf, settings: Pods) -> Manifest:
    run_policy = attempt.spec.run_policy
    return {
        "restartPolicy": "Never",
        # With the index as host name, gives pod 0 the name that the others look up.
        "subdomain": attempt.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": run_policy.termination_grace_period_seconds,
        "securityContext": sandbox.POD_SECURITY,
        "topologySpreadConstraints": sandbox.spread(attempt.ranks()),
        "tolerations": sandbox.tolerations(settings),
        "containers": [_container(attempt, settings)],
        "volumes": [*_volumes(attempt), *sandbox.cache_volumes(attempt.spec.model_cache)],
    }


def _container(attempt: AttemptOf, settings: Pods) -> Manifest:
    compute = attempt.spec.compute
    mounts, _ = sandbox.folders()
    container: Manifest = {
        "name": naming.TRAINER_CONTAINER,
        "image": compute.image or settings.image,
        "command": ["python", "-m", "tempflow_trainer.launch"],
        "env": _environment(attempt),
        "ports": [
            {"name": "progress", "containerPort": naming.PROGRESS_PORT, "protocol": "TCP"},
            {"name": "rendezvous", "containerPort": naming.MASTER_PORT, "protocol": "TCP"},
        ],
        "resources": _resources(compute),
        "securityContext": sandbox.CONTAINER_SECURITY,
        # The trainer leaves one line there; where it could not, the end of its log is taken.
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "job", "mountPath": _CONFIG_DIR, "readOnly": True},
            *mounts,
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - a volume of this pod alone
        ],
    }
    if attempt.spec.data.prompts_config_map is not None:
        prompts = {"name": "prompts", "mountPath": PROMPTS_DIR, "readOnly": True}
        container["volumeMounts"].append(prompts)
    container["volumeMounts"] += sandbox.cache_mounts(attempt.spec.model_cache)
    return {**container, **sandbox.secret_environment(compute)}


def _environment(attempt: AttemptOf) -> list[Manifest]:
    cache = attempt.spec.model_cache
    values = {
        naming.ENV_JOB_FILE: f"{_CONFIG_DIR}/{JOB_FILE}",
        naming.ENV_ATTEMPT: str(attempt.number),
        naming.ENV_MASTER_ADDR: naming.rank_zero_host(
            attempt.job, attempt.number, attempt.namespace
        ),
        naming.ENV_MASTER_PORT: str(naming.MASTER_PORT),
        naming.ENV_PROGRESS_PORT: str(naming.PROGRESS_PORT),
        naming.ENV_WORK_DIR: sandbox.WORK_DIR,
        naming.ENV_RUN_ID: naming.run_folder(attempt.namespace, attempt.job, attempt.uid),
        **sandbox.environment(cache),
        **variables(attempt.spec.compute.network),
    }
    if sandbox.cache_volumes(cache):
        values[naming.ENV_MODEL_CACHE] = sandbox.CACHE_DIR
    served = endpoints(attempt)
    if served:
        values[naming.ENV_REWARD_ENDPOINTS] = json.dumps(served)
    rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{naming.POD_INDEX}']"}}
    return [
        *({"name": name, "value": value} for name, value in values.items()),
        {"name": naming.ENV_NODE_RANK, "valueFrom": rank},
    ]


def _resources(compute: Compute) -> Manifest:
    """Memory's limit is above its request by /dev/shm, whose pages count against the container."""
    requests: Manifest = {}
    limits: Manifest = {}
    if compute.cpu is not None:
        requests["cpu"] = compute.cpu
    if compute.memory is not None:
        requests["memory"] = compute.memory
        limits["memory"] = str(total_bytes(compute.memory, compute.shared_memory))
    for name, count in _devices(compute).items():
        requests[name] = limits[name] = str(count)
    return {"requests": requests, "limits": limits}


def _devices(compute: Compute) -> dict[str, int]:
    """Resources that are counted: GPUs, and what else the job names."""
    each = compute.gpus_per_process
    if each is None:
        each = 1 if compute.device == "cuda" else 0
    gpus = {compute.gpu_resource: each * compute.processes_per_node} if each else {}
    return {**gpus, **compute.extended_resources}


def _volumes(attempt: AttemptOf) -> list[Manifest]:
    prompts = attempt.spec.data.prompts_config_map
    _, writable = sandbox.folders()
    return [
        {"name": "job", "configMap": {"name": attempt.config_name}},
        *([{"name": "prompts", "configMap": {"name": prompts}}] if prompts else []),
        *writable,
        {
            "name": "shm",
            "emptyDir": {"medium": "Memory", "sizeLimit": attempt.spec.compute.shared_memory},
        },
    ]
