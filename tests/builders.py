"""Objects as the API server stores them, built in a line: the only fixtures with knowledge.

``make_job().nodes(2).build()`` is the JSON, ``make_job().nodes(2).typed()`` what decisions see.
"""

from collections.abc import Mapping
from typing import Any, Self

from tempflow_api import naming
from tempflow_api.v1alpha1 import JobSpec
from tempflow_operator.decisions import instants
from tempflow_operator.decisions.observed import Snapshot, TrainingJob, snapshot
from tempflow_operator.decisions.observed import training_job as typed_job

Raw = dict[str, Any]

T0 = instants.seconds("2026-01-31T12:00:00Z")
"""The instant at which every story begins."""
UID = "11111111-2222-3333-4444-555555555555"


def at(seconds: float) -> str:
    """So many seconds after the beginning, as Kubernetes writes it."""
    return instants.timestamp(T0 + seconds)


def owner(uid: str, kind: str) -> list[Raw]:
    """Owner references with one controller."""
    return [{"kind": kind, "name": "owner", "uid": uid, "controller": True}]


class _Builder:
    def __init__(self, raw: Raw) -> None:
        self._raw = raw

    def build(self) -> Raw:
        return self._raw

    def with_raw(self, raw: Raw) -> Self:
        """Go on with an object that exists; it is changed in place."""
        self._raw = raw
        return self

    @property
    def status(self) -> Raw:
        found: Raw = self._raw.setdefault("status", {})
        return found

    def deleting(self, stop_by: float = 0) -> Self:
        """Being deleted; a pod is killed at ``stop_by`` at the latest."""
        self._raw["metadata"]["deletionTimestamp"] = at(stop_by)
        return self

    def condition(
        self, kind: str, reason: str, message: str = "", *, status: str = "True", seconds: float = 0
    ) -> Self:
        self.status.setdefault("conditions", []).append(
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": message,
                "lastTransitionTime": at(seconds),
            }
        )
        return self


class JobBuilder(_Builder):
    """A TempFlowGRPOJob that the API server has accepted and defaulted."""

    def spec(self, path: str, value: object) -> Self:
        """Set a field of the spec; None removes it."""
        *sections, last = path.split(".")
        block = self._raw["spec"]
        for section in sections:
            block = block.setdefault(section, {})
        if value is None:
            block.pop(last, None)
        else:
            block[last] = value
        return self

    def nodes(self, count: int) -> Self:
        return self.spec("compute.nodes", count)

    def suspended(self, suspended: bool = True) -> Self:
        return self.spec("runPolicy.suspend", suspended)

    def max_restarts(self, count: int) -> Self:
        return self.spec("runPolicy.maxRestarts", count)

    def with_status(self, status: Mapping[str, Any]) -> Self:
        self._raw["status"] = dict(status)
        return self

    def typed(self) -> TrainingJob:
        return typed_job(self._raw)

    def spec_only(self) -> JobSpec:
        return JobSpec.model_validate(self._raw["spec"])


def make_job(name: str = "demo", *, uid: str = UID) -> JobBuilder:
    """Two epochs of digits on one node."""
    spec = JobSpec.model_validate(
        {
            "model": {"family": "digits", "source": "builtin:digits", "tuning": "full"},
            "data": {"prompts": ["a 3", "a 4"]},
            "sampling": {"width": 14, "height": 14},
            "algorithm": {"epochs": 2},
            "rewards": [{"name": "digit"}],
            "checkpoint": {"uri": "s3://bucket/runs"},
            "compute": {"device": "cpu", "image": "trainer:1"},
        }
    )
    metadata = {
        "name": name,
        "namespace": "team",
        "uid": uid,
        "generation": 1,
        "resourceVersion": "7",
    }
    return JobBuilder(
        {
            "apiVersion": naming.API_VERSION,
            "kind": naming.KIND,
            "metadata": metadata,
            "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        }
    )


def _child(name: str, attempt: int, uid: str, owners: list[Raw]) -> Raw:
    labels = {
        naming.LABEL_JOB_NAME: "demo",
        naming.LABEL_JOB_UID: UID,
        naming.LABEL_ATTEMPT: str(attempt),
    }
    return {"name": name, "namespace": "team", "uid": uid, "labels": labels} | {
        "ownerReferences": owners
    }


class GangBuilder(_Builder):
    """The batch Job of one attempt."""

    def started(self, seconds: float = 0) -> Self:
        self.status["startTime"] = at(seconds)
        return self

    def queued(self) -> Self:
        self._raw["spec"]["suspend"] = True
        return self

    def complete(self, seconds: float = 100) -> Self:
        self.status["completionTime"] = at(seconds)
        return self.condition("Complete", "CompletionsReached", seconds=seconds)

    def failing(
        self, seconds: float = 100, *, reason: str = "BackoffLimitExceeded", message: str = ""
    ) -> Self:
        return self.condition("FailureTarget", reason, message, seconds=seconds)

    def failed(
        self, seconds: float = 100, *, reason: str = "BackoffLimitExceeded", message: str = ""
    ) -> Self:
        return self.condition("Failed", reason, message, seconds=seconds)


def make_gang(attempt: int = 1, *, nodes: int = 1, owned_by: str = UID) -> GangBuilder:
    """A Job whose pods the Job controller has not created yet."""
    name = naming.attempt_name("demo", attempt)
    return GangBuilder(
        {
            "metadata": _child(name, attempt, f"gang-{attempt}", owner(owned_by, naming.KIND)),
            "spec": {"parallelism": nodes, "completions": nodes},
        }
    )


class ServersBuilder(_Builder):
    """The Deployment that serves a reward to an attempt; its Service is there, too."""

    def refused(self, message: str) -> Self:
        return self.condition("ReplicaFailure", "FailedCreate", message)


def make_servers(attempt: int = 1, *, reward: str = "digit") -> ServersBuilder:
    """As the API server has taken it, of the first reward."""
    name = naming.reward_name("demo", attempt, 0)
    metadata = _child(name, attempt, f"servers-{attempt}", owner(UID, naming.KIND))
    metadata["labels"] |= {naming.LABEL_ROLE: naming.ROLE_REWARD, naming.LABEL_REWARD: reward}
    return ServersBuilder({"metadata": metadata, "spec": {}})


class PodBuilder(_Builder):
    """A pod of a gang, or a server of a reward."""

    def ready(self) -> Self:
        return self.running().condition("Ready", "")

    def crashing(self, code: int, message: str) -> Self:
        """It ended, was started again, and so on."""
        self.waiting("CrashLoopBackOff", "back-off 10s restarting failed container")
        end = {"exitCode": code, "reason": "Error", "message": message, "finishedAt": at(5)}
        self.status["containerStatuses"][0]["lastState"] = {"terminated": end}
        return self

    def running(self, *, ip: str = "10.0.0.1", node: str = "node-1") -> Self:
        self.status.update(phase="Running", podIP=ip)
        self._raw["spec"]["nodeName"] = node
        return self._state({"running": {"startedAt": at(1)}})

    def waiting(self, reason: str, message: str = "") -> Self:
        return self._state({"waiting": {"reason": reason, "message": message}})

    def unschedulable(self, message: str) -> Self:
        return self.condition("PodScheduled", "Unschedulable", message, status="False")

    def succeeded(self) -> Self:
        self.status["phase"] = "Succeeded"
        return self._state({"terminated": {"exitCode": 0, "reason": "Completed"}})

    def failed(
        self, code: int, message: str = "", *, reason: str = "Error", seconds: float = 90
    ) -> Self:
        self.status["phase"] = "Failed"
        end = {"exitCode": code, "reason": reason, "message": message, "finishedAt": at(seconds)}
        return self._state({"terminated": end})

    def disrupted(self, reason: str = "EvictionByEvictionAPI", message: str = "drained") -> Self:
        return self.condition("DisruptionTarget", reason, message, seconds=80)

    def turned_away(self, reason: str, message: str = "") -> Self:
        """Failed as a whole, before a container ran."""
        self.status.update(phase="Failed", reason=reason, message=message)
        return self

    def _state(self, state: Raw) -> Self:
        serves = naming.LABEL_REWARD in self._raw["metadata"]["labels"]
        name = naming.REWARD_CONTAINER if serves else naming.TRAINER_CONTAINER
        self.status["containerStatuses"] = [{"name": name, "state": state}]
        return self


def make_pod(attempt: int = 1, rank: int = 0) -> PodBuilder:
    """A pod that waits for a node."""
    name = f"{naming.attempt_name('demo', attempt)}-{rank}-x"
    metadata = _child(name, attempt, f"pod-{attempt}-{rank}", owner(f"gang-{attempt}", "Job"))
    metadata["annotations"] = {naming.POD_INDEX: str(rank)}
    return PodBuilder({"metadata": metadata, "spec": {}, "status": {"phase": "Pending"}})


def make_server(attempt: int = 1, *, reward: str = "digit") -> PodBuilder:
    """A pod of a reward's Deployment that waits for a node."""
    servers = make_servers(attempt, reward=reward).build()["metadata"]
    metadata = {**servers, "name": f"{servers['name']}-x", "uid": f"server-{attempt}"}
    metadata["ownerReferences"] = owner(f"replicas-{attempt}", "ReplicaSet")
    return PodBuilder({"metadata": metadata, "spec": {}, "status": {"phase": "Pending"}})


def make_part(attempt: int = 1, *, config: bool = False) -> Raw:
    """The metadata of a Service of an attempt, or of its ConfigMap."""
    name = naming.attempt_name("demo", attempt) + (f"-{UID[:8]}" if config else "")
    return {"metadata": _child(name, attempt, f"part-{attempt}", owner(UID, naming.KIND))}


def seen(
    *objects: GangBuilder | PodBuilder | ServersBuilder, parts: tuple[int, ...] = ()
) -> Snapshot:
    """What a pass sees; ``parts`` are the attempts that have a Service and a ConfigMap."""
    deployments = [thing.build() for thing in objects if isinstance(thing, ServersBuilder)]
    services = [thing for thing in deployments if "deletionTimestamp" not in thing["metadata"]]
    return snapshot(
        UID,
        jobs=[thing.build() for thing in objects if isinstance(thing, GangBuilder)],
        pods=[thing.build() for thing in objects if isinstance(thing, PodBuilder)],
        parts={
            "Service": [*(make_part(attempt) for attempt in parts), *services],
            "ConfigMap": [make_part(attempt, config=True) for attempt in parts],
        },
        deployments=deployments,
    )
