"""Which calls bring the cluster to where the accounts say it should be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempflow_operator.decisions import stall
from tempflow_operator.decisions.ledger import Ledger, deadline_at, opened, starts_by
from tempflow_operator.decisions.observed import (
    RECEIPT,
    Gang,
    Part,
    Servers,
    Snapshot,
    TrainingJob,
)
from tempflow_operator.decisions.reading import Reading
from tempflow_operator.settings import Timing


@dataclass(frozen=True)
class Create:
    """Create an object that is never changed afterwards."""

    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])


@dataclass(frozen=True)
class Delete:
    """Delete exactly the object with that UID; a Job, and a Deployment, stay visible until their
    pods are gone."""

    kind: str
    name: str
    uid: str


Action = Create | Delete


def next_attempt(
    ledger: Ledger, job: TrainingJob, seen: Snapshot, now: float, timing: Timing
) -> Ledger:
    """``ledger`` with the next attempt opened, when it is time for one.

    Status has to know first how the last one ended: a pass that starts the next one and dies before
    it writes status would otherwise take that with it, and the restart that it counts.
    """
    if ledger.end is not None or ledger.open or job.suspend or job.deleting or job.spec is None:
        return ledger
    if ledger.attempts != tuple(job.status.attempts):
        return ledger
    if ledger.next_attempt_at is not None and now < ledger.next_attempt_at:
        return ledger
    if not released(ledger, seen, now, timing):
        return ledger
    return opened(ledger, ledger.attempt + 1)


def released(ledger: Ledger, seen: Snapshot, now: float, timing: Timing) -> bool:
    """Whether the last attempt holds nothing any more.

    A kubelet kills a pod when its grace period is over. One that is still there long after stands
    on a lost node, and is taken for dead with it.
    """
    if ledger.open:
        return False
    # Servers of the next number are of a pass that was cut off before anything could run.
    servers = [servers for servers in seen.servers if servers.attempt <= ledger.attempt]
    if seen.may_start_pods or any(not servers.deleting for servers in servers):
        return False
    pods = (*seen.pods, *(pod for pod in seen.server_pods if pod.attempt <= ledger.attempt))
    moments = [pod.lost_at(timing.lost_node) for pod in pods if pod.live]
    return all(moment is not None and moment <= now for moment in moments)


def actions(
    job: TrainingJob,
    seen: Snapshot,
    ledger: Ledger,
    desired: Sequence[Mapping[str, Any]],
    now: float,
) -> list[Action]:
    """What to do, in order. ``desired`` are the objects of the open attempt, in the order of their
    creation."""
    if job.deleting:
        return []  # the garbage collector takes it all
    if _expired(job, ledger, now):
        return [Delete(kind=KIND_OF_JOB, name=job.name, uid=job.uid)]
    removals = _removals(job, seen, ledger, recorded=job.status.attempt)
    wanted = desired if ledger.open else ()
    if _waits_in_queue(job, seen, ledger):
        wanted = [manifest for manifest in wanted if manifest["kind"] != "Deployment"]
    return [*removals, *_creations(seen, wanted)]


def _waits_in_queue(job: TrainingJob, seen: Snapshot, ledger: Ledger) -> bool:
    """Whether a queue holds the attempt's gang back: its servers then hold nothing either."""
    gang = seen.gang(ledger.attempt)
    if gang is not None:
        return gang.queued
    return job.spec is not None and job.spec.run_policy.queue is not None


# The custom resource itself, deleted when its time to live is over.
KIND_OF_JOB = "TempFlowGRPOJob"


def _creations(seen: Snapshot, desired: Sequence[Mapping[str, Any]]) -> list[Action]:
    present = {("Job", gang.name) for gang in seen.gangs}
    present |= {(part.kind, part.name) for part in seen.parts}
    present |= {("Deployment", servers.name) for servers in seen.servers}
    creations = [Create(manifest) for manifest in desired]
    return [create for create in creations if (create.kind, create.name) not in present]


def _removals(job: TrainingJob, seen: Snapshot, ledger: Ledger, *, recorded: int) -> list[Action]:
    """``recorded`` is the newest attempt that the stored status knows."""
    gangs = [gang for gang in seen.gangs if not gang.deleting and _superfluous(gang, ledger)]
    parts = [part for part in seen.parts if not part.deleting]
    parts = [part for part in parts if not _in_use(part, ledger)]
    # The lasting witness of a number that status does not know yet stays until it does.
    parts = [part for part in parts if part.kind != RECEIPT or part.attempt <= recorded]
    idle = _waits_in_queue(job, seen, ledger)
    servers = [servers for servers in seen.servers if not servers.deleting]
    servers = [servers for servers in servers if idle or not _in_use(servers, ledger)]
    return [
        *(Delete("Job", gang.name, gang.uid) for gang in gangs),
        *(Delete("Deployment", one.name, one.uid) for one in servers),
        *(Delete(part.kind, part.name, part.uid) for part in parts),
    ]


def _superfluous(gang: Gang, ledger: Ledger) -> bool:
    """Whether a gang has to go. The newest ended one and the one before it stay, without running
    pods, so that their logs can be read; a failing one is being stopped by the Job controller."""
    if gang.attempt < ledger.attempt - 1:
        return True
    if ledger.open and gang.attempt == ledger.attempt:
        return False
    return not gang.terminal and gang.failing is None


def _in_use(part: Part | Servers, ledger: Ledger) -> bool:
    return ledger.open and part.attempt == ledger.attempt


def _expired(job: TrainingJob, ledger: Ledger, now: float) -> bool:
    due = _expires_at(job, ledger)
    return due is not None and now >= due


def _expires_at(job: TrainingJob, ledger: Ledger) -> float | None:
    ttl = job.spec.run_policy.ttl_seconds_after_finished if job.spec is not None else None
    if ttl is None or ledger.end is None:
        return None
    return ledger.end.time + ttl


def look_again_at(
    job: TrainingJob,
    seen: Snapshot,
    ledger: Ledger,
    now: float,
    timing: Timing,
    reading: Reading | None = None,
) -> float | None:
    """When the next pass is due if nothing happens; None when only an event can change anything."""
    if job.deleting:
        return None
    moments = [deadline_at(ledger, job), starts_by(ledger, job), _expires_at(job, ledger)]
    if ledger.open:
        moments.append(stall.stalls_at(job, ledger.attempt, reading, now))
        moments += [pod.lost_at(timing.lost_node) for pod in seen.pods_of(ledger.attempt)]
    # Nothing tells of the moment in which a Deployment that a queue took back is gone.
    if (ledger.open and any(servers.deleting for servers in seen.servers)) or (
        not ledger.open and seen.anything_live
    ):
        moments.append(now + timing.recheck_stopping)
    elif ledger.end is None and not ledger.open and not job.suspend:
        moments.append(ledger.next_attempt_at)
    return min((moment for moment in moments if moment is not None), default=None)
