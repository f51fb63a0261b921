"""Settings of the operator: what each is for, its unit, and the environment variable that sets it.

One process has one ``Settings``; the pure parts take the block that concerns them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When things happen to a job, in seconds."""

    restart_delay: float = 10.0
    """Before the second attempt; doubles with every further failure. Long enough for a node that
    is just going down to be marked so."""
    restart_delay_limit: float = 300.0
    """The pause between attempts grows no further."""
    disruption_delay: float = 2.0
    """Before the attempt after a disruption. Short: the cluster, not the job, was at fault."""
    lost_node: float = 120.0
    """A pod on a lost node cannot be confirmed dead and stays Terminating. So long after its grace
    period the next attempt starts all the same: the checkpoint store fences the old one."""
    recheck_stopping: float = 5.0
    """Between two looks at pods that are stopping, should their events be lost."""


GANG_SCHEDULERS = ("", "volcano", "scheduler-plugins")


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What the pods of an attempt look like beyond what the job says."""

    image: str | None = None
    """Of the trainer, for jobs that name none in ``spec.compute.image``."""
    unreachable_toleration: int = 60
    """Seconds that a pod stays bound to a node which is not ready. Kubernetes' own default of 300
    leaves the rest of the gang idle for five minutes."""
    gang_scheduler: str = ""
    """Which scheduler gets a PodGroup for each attempt; none by default, as the cluster's own
    knows no such thing."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Reading progress from rank 0, in seconds and bytes."""

    interval: float = 15.0
    """Between two reads of one job, and so between two writes of its progress into status."""
    timeout: float = 5.0
    """For one answer, from connecting to the last byte."""
    max_bytes: int = 16_384
    """A longer answer is not a progress record."""
    parallel: int = 16
    """Reads in flight, over all jobs."""
    tolerated_failures: int = 3
    """Failed reads in a row before status mentions it: a trainer that starts does not answer."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The work queue, in seconds."""

    workers: int = 8
    """Passes at a time. A pass waits for the API server most of the time."""
    settle: float = 1.0
    """Between an event of a pod, or of a Job, and the pass: pods start and stop together. What they
    lead to is mostly a status, and meanwhile other jobs can be started. A change of a job itself is
    one event, and is looked at at once."""
    gap: float = 0.5
    """Least time between two passes of one job."""
    retry_delay: float = 1.0
    """After a failed pass; doubles with every further failure of that job."""
    retry_delay_limit: float = 60.0
    resync: float = 300.0
    """Between two lists of all jobs, which repair what lost events broke."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Leader election, in seconds: one replica acts, the others wait."""

    enabled: bool = True
    name: str = "tempflow-operator"
    namespace: str = "default"
    identity: str = "local"
    duration: float = 12.0
    """A lease that nobody renewed for so long is free."""
    renew_deadline: float = 8.0
    """A leader that could not renew for so long exits: shorter than the duration, so that it is
    gone before another one takes over."""
    retry: float = 1.6
    """Between two renewals, and between two looks of a replica that waits."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """What counts as alive, in seconds."""

    port: int = 8081
    """Serves /healthz, /readyz and /metrics."""
    queue_stuck: float = 180.0
    """A job that has waited for its pass, or been in one, for so long."""
    watch_stuck: float = 120.0
    """A change that a list has shown and the watch has not delivered for so long."""


@dataclass(frozen=True, kw_only=True)
class Logs:
    json: bool = False
    level: str = "INFO"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of them."""

    namespaces: tuple[str, ...] = ()
    """Namespaces that are watched; none means the whole cluster."""
    timing: Timing = field(default_factory=Timing)
    pods: Pods = field(default_factory=Pods)
    progress: Progress = field(default_factory=Progress)
    queue: Queue = field(default_factory=Queue)
    lease: Lease = field(default_factory=Lease)
    health: Health = field(default_factory=Health)
    logs: Logs = field(default_factory=Logs)


class SettingInvalid(ValueError):
    """An environment variable of the operator has a value that it cannot have."""


def from_environment(environment: Mapping[str, str]) -> Settings:
    """The settings that ``environment`` asks for; an empty variable counts as absent."""
    given = {key: value for key, value in environment.items() if value}

    def number(key: str, default: float, *, least: float) -> float:
        return _number(given, key, default, least=least)

    lease_seconds = number("TEMPFLOW_LEASE_SECONDS", Lease.duration, least=3)
    return Settings(
        namespaces=_words(given.get("TEMPFLOW_WATCH_NAMESPACES", "")),
        timing=Timing(
            restart_delay=number("TEMPFLOW_RESTART_DELAY_SECONDS", 10, least=0),
            lost_node=number("TEMPFLOW_LOST_NODE_SECONDS", 120, least=0),
        ),
        pods=Pods(
            image=given.get("TEMPFLOW_TRAINER_IMAGE"),
            unreachable_toleration=int(number("TEMPFLOW_UNREACHABLE_SECONDS", 60, least=0)),
            gang_scheduler=_choice(given, "TEMPFLOW_GANG_SCHEDULER", GANG_SCHEDULERS),
        ),
        progress=Progress(interval=number("TEMPFLOW_PROGRESS_SECONDS", 15, least=1)),
        queue=Queue(
            workers=int(number("TEMPFLOW_WORKERS", 8, least=1)),
            resync=number("TEMPFLOW_RESYNC_SECONDS", 300, least=5),
        ),
        lease=Lease(
            enabled=_choice(given, "TEMPFLOW_LEADER_ELECTION", ("true", "false")) == "true",
            name=given.get("TEMPFLOW_LEASE_NAME", Lease.name),
            namespace=given.get("POD_NAMESPACE", Lease.namespace),
            identity=given.get("POD_NAME", given.get("HOSTNAME", Lease.identity)),
            duration=lease_seconds,
            renew_deadline=lease_seconds * 2 / 3,
            retry=lease_seconds * 2 / 15,
        ),
        health=Health(port=int(number("TEMPFLOW_HTTP_PORT", 8081, least=0))),
        logs=Logs(
            json=_choice(given, "TEMPFLOW_LOG_FORMAT", ("text", "json")) == "json",
            level=_choice(given, "TEMPFLOW_LOG_LEVEL", ("INFO", "DEBUG", "WARNING", "ERROR")),
        ),
    )


ENVIRONMENT: Mapping[str, str] = {
    "TEMPFLOW_WATCH_NAMESPACES": "namespaces to watch, separated by commas; empty: all",
    "TEMPFLOW_TRAINER_IMAGE": "image of the trainer for jobs that name none",
    "TEMPFLOW_RESTART_DELAY_SECONDS": "pause before the second attempt; doubles up to 300",
    "TEMPFLOW_LOST_NODE_SECONDS": "patience with pods that a lost node keeps Terminating",
    "TEMPFLOW_UNREACHABLE_SECONDS": "how long pods stay bound to a node that is not ready",
    "TEMPFLOW_GANG_SCHEDULER": "volcano or scheduler-plugins: create a PodGroup for each attempt",
    "TEMPFLOW_PROGRESS_SECONDS": "between two reads of a job's progress",
    "TEMPFLOW_WORKERS": "reconcile passes at a time",
    "TEMPFLOW_RESYNC_SECONDS": "between two lists of all jobs",
    "TEMPFLOW_LEADER_ELECTION": "true or false",
    "TEMPFLOW_LEASE_NAME": "name of the Lease",
    "TEMPFLOW_LEASE_SECONDS": "how long a lease lasts without renewal",
    "TEMPFLOW_HTTP_PORT": "port of /healthz, /readyz and /metrics",
    "TEMPFLOW_LOG_FORMAT": "text or json",
    "TEMPFLOW_LOG_LEVEL": "INFO, DEBUG, WARNING or ERROR",
    "POD_NAMESPACE": "namespace of the Lease",
    "POD_NAME": "name under which this replica holds the Lease",
}
"""Every variable that the operator reads, for the documentation and the chart's tests."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for part in text.split(",") if (word := part.strip()))


def _number(given: Mapping[str, str], key: str, default: float, *, least: float) -> float:
    convert: Callable[[str], float] = float
    try:
        value = convert(given.get(key, str(default)))
    except ValueError:
        raise SettingInvalid(f"{key}={given[key]!r}: expected a number") from None
    if not least <= value <= 86_400:
        raise SettingInvalid(f"{key}={given[key]!r}: expected {least:g} to 86400")
    return value


def _choice(given: Mapping[str, str], key: str, choices: tuple[str, ...]) -> str:
    """The first choice is the default."""
    value = given.get(key, choices[0])
    if value not in choices:
        raise SettingInvalid(f"{key}={value!r}: expected one of {', '.join(choices)}")
    return value
