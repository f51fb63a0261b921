"""What the API server holds, typed, reduced to what decides something.

A *job* is a ``TempFlowGRPOJob``; the batch Job of one attempt is called its *gang*.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError

from tempflow_api import termination
from tempflow_api.naming import (
    LABEL_ATTEMPT,
    LABEL_REWARD,
    OPERATOR,
    POD_INDEX,
    REWARD_CONTAINER,
    TRAINER_CONTAINER,
    run_folder,
)
from tempflow_api.rules import broken_rules
from tempflow_api.status import JobStatus
from tempflow_api.termination import LastWords
from tempflow_api.v1alpha1 import JobSpec
from tempflow_operator.decisions import instants
from tempflow_operator.decisions.adoption import owned_by

Raw = Mapping[str, Any]

RECEIPT = "ConfigMap"
"""The kind of the object that shows that an attempt's number is used."""


class Key(NamedTuple):
    """Which job, as the labels of its children and its own address have it."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """The custom resource."""

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str = ""
    deleting: bool = False
    managed_by: str | None = None
    """Who looks after it; even a spec that is not valid says so."""
    spec: JobSpec | None
    """None when the stored spec is not valid; ``problems`` says why."""
    problems: tuple[str, ...] = ()
    status: JobStatus
    stored_status: Raw = field(default_factory=dict)
    """As it is stored, to tell whether a write would change anything."""

    @property
    def ours(self) -> bool:
        """Whether this operator looks after it."""
        return self.managed_by in (None, OPERATOR)

    @property
    def run_id(self) -> str:
        """Under which the trainer files its checkpoints."""
        return run_folder(self.namespace, self.name, self.uid)

    @property
    def suspend(self) -> bool:
        return self.spec is not None and self.spec.run_policy.suspend

    @property
    def cancel(self) -> bool:
        return self.spec is not None and self.spec.run_policy.cancel


@dataclass(frozen=True, kw_only=True)
class Why:
    """A reason as Kubernetes gives it."""

    reason: str
    message: str = ""
    time: float | None = None


@dataclass(frozen=True, kw_only=True)
class Gang:
    """The batch Job of one attempt."""

    name: str
    uid: str
    attempt: int
    nodes: int = 1
    start_time: float | None = None
    """When its pods were allowed to start; None while a queue holds it back."""
    queued: bool = False
    deleting: bool = False
    failing: Why | None = None
    """It has failed; some of its pods may still be stopping."""
    completed_at: float | None = None
    terminal: bool = False
    """Complete or Failed, and all its pods have ended."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    """What it left for people."""
    words: LastWords | None = None
    """What it left for the operator."""
    time: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pod:
    """One pod of a gang, or of the servers of a reward."""

    name: str
    uid: str = ""
    attempt: int
    rank: int | None = None
    reward: str = ""
    """Which reward it serves; empty for a pod of a gang."""
    phase: str = "Pending"
    ready: bool = False
    """Its container passes its readiness probe, if it has one."""
    ip: str = ""
    node: str = ""
    stop_by: float | None = None
    """It is being deleted, and its kubelet kills it no later."""
    waiting: Why | None = None
    """Why the container does not run yet."""
    unschedulable: str = ""
    """What the scheduler says."""
    disruption: Why | None = None
    """The cluster took the pod away: preemption, eviction, a drained or lost node."""
    ended: Ended | None = None
    """How its container ended; of one that was started again, the last time."""

    @property
    def live(self) -> bool:
        return self.phase not in ("Succeeded", "Failed")

    @property
    def deleting(self) -> bool:
        return self.stop_by is not None

    def lost_at(self, patience: float) -> float | None:
        """When it is taken for dead with its node; None while nobody has asked it to stop."""
        return self.stop_by + patience if self.live and self.stop_by is not None else None


@dataclass(frozen=True, kw_only=True)
class Part:
    """What an attempt has beside its gang: a Service, a ConfigMap, perhaps a NetworkPolicy and a
    PodGroup. Only its existence matters."""

    kind: str
    name: str
    uid: str
    attempt: int
    deleting: bool = False


@dataclass(frozen=True, kw_only=True)
class Servers:
    """The Deployment that serves one reward to an attempt."""

    name: str
    uid: str
    attempt: int
    reward: str
    deleting: bool = False
    failure: str = ""
    """Why its pods cannot be created."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything in the cluster that belongs to one job."""

    gangs: tuple[Gang, ...] = ()
    pods: tuple[Pod, ...] = ()
    """Of gangs."""
    parts: tuple[Part, ...] = ()
    servers: tuple[Servers, ...] = ()
    server_pods: tuple[Pod, ...] = ()

    def gang(self, attempt: int) -> Gang | None:
        return next((gang for gang in self.gangs if gang.attempt == attempt), None)

    def pods_of(self, attempt: int) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.attempt == attempt)

    def servers_of(self, attempt: int) -> tuple[Servers, ...]:
        return tuple(servers for servers in self.servers if servers.attempt == attempt)

    def pods_serving(self, attempt: int, reward: str) -> tuple[Pod, ...]:
        return tuple(
            pod for pod in self.server_pods if (pod.attempt, pod.reward) == (attempt, reward)
        )

    @property
    def newest_attempt(self) -> int:
        """The highest number under which something may have run: that of a gang, or of a
        ConfigMap, which is created after its gang and without which no pod starts."""
        receipts = (part.attempt for part in self.parts if part.kind == RECEIPT)
        return max((*(gang.attempt for gang in self.gangs), *receipts), default=0)

    @property
    def anything_live(self) -> bool:
        """Whether something may still run or start."""
        return (
            any(not gang.terminal for gang in self.gangs)
            or bool(self.servers)
            or any(pod.live for pod in (*self.pods, *self.server_pods))
        )

    @property
    def may_start_pods(self) -> bool:
        """Whether the Job controller may still create a pod."""
        return any(not (gang.deleting or gang.failing or gang.terminal) for gang in self.gangs)


def starts_servers(raw: Raw) -> bool:
    """Whether the job has rewards that the operator serves. What is fixed for its life."""
    rewards = raw.get("spec", {}).get("rewards") or []
    return any(reward.get("placement") == "service" for reward in rewards)


def may_have_policy(raw: Raw) -> bool:
    """Whether an attempt of the job can have a NetworkPolicy: it asks for one, or its spec has
    changed, and may have asked before."""
    network = raw.get("spec", {}).get("compute", {}).get("network", {})
    return network.get("policy") is not False or raw["metadata"].get("generation", 0) > 1


def training_job(raw: Raw) -> TrainingJob:
    """The custom resource, validated with the classes that made its schema."""
    metadata = raw["metadata"]
    spec, problems = _spec(raw.get("spec", {}))
    stored: Raw = raw.get("status") or {}
    return TrainingJob(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 0),
        resource_version=metadata.get("resourceVersion", ""),
        deleting="deletionTimestamp" in metadata,
        managed_by=raw.get("spec", {}).get("managedBy"),
        spec=spec,
        problems=problems,
        status=_status(stored),
        stored_status=stored,
    )


def _spec(raw: Raw) -> tuple[JobSpec | None, tuple[str, ...]]:
    try:
        spec = JobSpec.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        return None, tuple(_sentence(problem["loc"], problem["msg"]) for problem in found)
    return spec, tuple(f"{rule.path}: {rule.message}" for rule in broken_rules(spec))


def _sentence(location: Iterable[int | str], message: str) -> str:
    return f"{'.'.join(['spec', *map(str, location)])}: {message}"


def _status(raw: Raw) -> JobStatus:
    """What an operator wrote. Anything else is derived anew from the objects that exist."""
    try:
        return JobStatus.model_validate(raw)
    except ValidationError:
        return JobStatus()


def snapshot(
    owner_uid: str,
    *,
    jobs: Iterable[Raw] = (),
    pods: Iterable[Raw] = (),
    parts: Mapping[str, Iterable[Raw]] | None = None,
    deployments: Iterable[Raw] = (),
) -> Snapshot:
    """What was listed by label, less what the job does not own. ``parts`` are by kind."""
    gangs = tuple(_gang(job) for job in jobs if owned_by(job["metadata"], owner_uid))
    # Only our own templates carry the job's UID, and a pod outlives what it was made by.
    found = [_pod(pod) for pod in pods]
    return Snapshot(
        gangs=gangs,
        pods=tuple(pod for pod in found if not pod.reward),
        servers=tuple(_servers(d) for d in deployments if owned_by(d["metadata"], owner_uid)),
        server_pods=tuple(pod for pod in found if pod.reward),
        parts=tuple(
            _part(kind, part["metadata"])
            for kind, listed in (parts or {}).items()
            for part in listed
            if owned_by(part["metadata"], owner_uid)
        ),
    )


def _attempt(metadata: Raw) -> int:
    text = metadata.get("labels", {}).get(LABEL_ATTEMPT, "")
    return int(text) if text.isdecimal() else 0


def _conditions(raw: Raw) -> dict[str, Why]:
    """The conditions that are true, by type."""
    return {
        condition["type"]: Why(
            reason=condition.get("reason", ""),
            message=condition.get("message", ""),
            time=_time(condition.get("lastTransitionTime")),
        )
        for condition in raw.get("status", {}).get("conditions") or []
        if condition.get("status") == "True"
    }


def _time(text: str | None) -> float | None:
    return None if text is None else instants.seconds(text)


def _gang(raw: Raw) -> Gang:
    metadata, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    true = _conditions(raw)
    complete = true.get("Complete")
    done = _time(status.get("completionTime")) or (complete.time if complete else None)
    return Gang(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_attempt(metadata),
        nodes=spec.get("parallelism", 1),
        start_time=_time(status.get("startTime")),
        queued=bool(spec.get("suspend")),
        deleting="deletionTimestamp" in metadata,
        failing=true.get("Failed") or true.get("FailureTarget"),
        completed_at=done if complete else None,
        terminal=complete is not None or "Failed" in true,
    )


def _part(kind: str, metadata: Raw) -> Part:
    return Part(
        kind=kind,
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_attempt(metadata),
        deleting="deletionTimestamp" in metadata,
    )


def _servers(raw: Raw) -> Servers:
    metadata = raw["metadata"]
    failure = _conditions(raw).get("ReplicaFailure")
    return Servers(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_attempt(metadata),
        reward=metadata.get("labels", {}).get(LABEL_REWARD, ""),
        deleting="deletionTimestamp" in metadata,
        failure=failure.message or failure.reason if failure is not None else "",
    )


def last_words(raw_pod: Raw) -> LastWords | None:
    """What the ended trainer in a pod left for the operator."""
    ended = _pod(raw_pod).ended
    return ended.words if ended is not None else None


def _pod(raw: Raw) -> Pod:
    metadata, status = raw["metadata"], raw.get("status", {})
    statuses = status.get("containerStatuses") or []
    ours = (TRAINER_CONTAINER, REWARD_CONTAINER)
    container: Raw = next((c for c in statuses if c.get("name") in ours), {})
    index = metadata.get("annotations", {}).get(POD_INDEX, "")
    return Pod(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        attempt=_attempt(metadata),
        rank=int(index) if index.isdecimal() else None,
        reward=metadata.get("labels", {}).get(LABEL_REWARD, ""),
        phase=status.get("phase", "Pending"),
        ready="Ready" in _conditions(raw),
        ip=status.get("podIP", ""),
        node=raw.get("spec", {}).get("nodeName", ""),
        stop_by=_time(metadata.get("deletionTimestamp")),
        waiting=_waiting(container),
        unschedulable=_unschedulable(status),
        disruption=_disruption(raw, status),
        ended=_ended(container),
    )


def _waiting(container: Raw) -> Why | None:
    waiting = container.get("state", {}).get("waiting")
    if not waiting:
        return None
    return Why(reason=waiting.get("reason", ""), message=waiting.get("message", ""))


def _unschedulable(status: Raw) -> str:
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return condition.get("message", "") or "no node fits"
    return ""


def _disruption(raw: Raw, status: Raw) -> Why | None:
    target = _conditions(raw).get("DisruptionTarget")
    if target is None and status.get("phase") == "Failed" and status.get("reason"):
        # The kubelet turned the pod away or evicted it: the pod as a whole has a reason only then.
        return Why(reason=status["reason"], message=status.get("message", ""))
    return target


def _ended(container: Raw) -> Ended | None:
    states = (container.get(name, {}).get("terminated") for name in ("state", "lastState"))
    state = next((state for state in states if state), None)
    if state is None:
        return None
    words, message = termination.read(state.get("message", ""))
    return Ended(
        exit_code=state.get("exitCode", 0),
        reason=state.get("reason", ""),
        message=message,
        words=words,
        time=_time(state.get("finishedAt")),
    )
