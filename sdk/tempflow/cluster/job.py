"""A job, an event and a line of a log, as the client hands them out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from tempflow.cluster.errors import ClusterError
from tempflow_api import naming
from tempflow_api.conditions import ConditionType, find, is_true
from tempflow_api.status import Condition, JobStatus
from tempflow_api.v1alpha1 import JobSpec


@dataclass(frozen=True)
class Job:
    """A ``TempFlowGRPOJob`` as the API server holds it, at one moment."""

    raw: Mapping[str, Any] = field(repr=False)
    """The object, plain."""

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.raw["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.raw["metadata"]["uid"])

    @property
    def resource_version(self) -> str:
        return str(self.raw["metadata"]["resourceVersion"])

    @property
    def created(self) -> str:
        """An instant in UTC, as Kubernetes writes it."""
        return str(self.raw["metadata"]["creationTimestamp"])

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self.raw["metadata"]

    @cached_property
    def spec(self) -> JobSpec:
        """Raises ClusterError when the cluster's version of TempFlow knows fields that this one
        does not."""
        try:
            return JobSpec.model_validate(self.raw["spec"], by_alias=True, by_name=False)
        except ValidationError as error:
            raise self._not_understood("spec", error) from error

    @cached_property
    def status(self) -> JobStatus:
        """Raises ClusterError as ``spec`` does."""
        try:
            found = self.raw.get("status") or {}
            return JobStatus.model_validate(found, by_alias=True, by_name=False)
        except ValidationError as error:
            raise self._not_understood("status", error) from error

    def _not_understood(self, part: str, error: ValidationError) -> ClusterError:
        where = ".".join(str(step) for step in error.errors()[0]["loc"])
        return ClusterError(
            f"job {self.namespace}/{self.name}: {part}.{where} is not known to this version of "
            "tempflow: install the version that the cluster has"
        )

    @property
    def phase(self) -> str:
        """The one word for people; empty until the operator has seen the job."""
        if self.deleting:
            return "Deleting"
        return str((self.raw.get("status") or {}).get("phase", ""))

    def condition(self, kind: ConditionType) -> Condition | None:
        return find(self.status.conditions, kind)

    def is_true(self, kind: ConditionType) -> bool:
        return is_true(self.status.conditions, kind)

    @property
    def finished(self) -> bool:
        """It has ended, well or badly, and holds nothing any more."""
        return self.is_true(ConditionType.FINISHED)

    @property
    def succeeded(self) -> bool:
        return self.is_true(ConditionType.SUCCEEDED)

    @property
    def why(self) -> str:
        """The reason and message of the condition that matters most now; empty if there is none."""
        for kind in (ConditionType.FAILED, ConditionType.SUCCEEDED, ConditionType.SUSPENDED):
            if self.is_true(kind):
                return _sentence(self.condition(kind))
        return _sentence(self.condition(ConditionType.RUNNING))

    @property
    def run_folder(self) -> str:
        """The run's folder below ``spec.checkpoint.uri``."""
        return naming.run_folder(self.namespace, self.name, self.uid)


def _sentence(condition: Condition | None) -> str:
    if condition is None:
        return ""
    return f"{condition.reason}: {condition.message}" if condition.message else condition.reason


@dataclass(frozen=True)
class JobEvent:
    """What happened to a job that was watched; ``deleted`` is the last that is told of it."""

    kind: Literal["added", "changed", "deleted"]
    job: Job


@dataclass(frozen=True)
class Event:
    """Something that a component of the cluster told about a job, its Job or its pods."""

    time: str
    """When it happened last."""
    type: str
    """``Normal`` or ``Warning``."""
    reason: str
    about: str
    """Kind and name, for instance ``Pod/digits-a1-0-x7k2p``."""
    note: str
    count: int
    uid: str
    version: str


class LogLine(NamedTuple):
    """A line that a rank wrote."""

    time: str
    """In UTC, to the nanosecond."""
    attempt: int
    node_rank: int
    """The pod's index; the processes of one pod share a log."""
    text: str


def event_of(raw: Mapping[str, Any]) -> Event:
    """From the API server's form, old or new."""
    series = raw.get("series") or {}
    meta, about = raw["metadata"], raw.get("regarding") or {}
    times = (
        series.get("lastObservedTime"),
        raw.get("deprecatedLastTimestamp"),
        raw.get("eventTime"),
        meta.get("creationTimestamp"),
    )
    return Event(
        time=next((time for time in times if time), ""),
        type=str(raw.get("type", "")),
        reason=str(raw.get("reason", "")),
        about=f"{about.get('kind', '')}/{about.get('name', '')}",
        note=str(raw.get("note", "")).strip(),
        count=int(series.get("count") or raw.get("deprecatedCount") or 1),
        uid=str(meta.get("uid", "")),
        version=str(meta.get("resourceVersion", "")),
    )


def concerns(raw: Mapping[str, Any], job_name: str, uid: str) -> bool:
    """Whether an event is about the job with that UID, or about an object of one of its attempts.

    The latter are told by their names, for the objects themselves may be gone.
    """
    about = raw.get("regarding") or {}
    if about.get("kind") == naming.KIND:
        return bool(about.get("uid") == uid)
    return bool(_child_of(job_name).match(str(about.get("name", ""))))


def _child_of(job_name: str) -> re.Pattern[str]:
    """Names of the Job, Service and ConfigMap of an attempt, and of its pods."""
    return re.compile(rf"^{re.escape(job_name)}-a[0-9]+(-[0-9]+-[a-z0-9]{{5}})?$")
