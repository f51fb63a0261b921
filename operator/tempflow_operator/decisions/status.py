"""The status that tells the truth about what was observed and decided."""

from dataclasses import dataclass

from tempflow_api.conditions import ConditionType, Reason, phase_of, set_condition
from tempflow_api.status import Condition, JobStatus, LastCheckpoint, Progress, Replicas
from tempflow_api.termination import LastWords
from tempflow_operator.decisions import failure, hindrance, instants, stall
from tempflow_operator.decisions.ledger import Ledger
from tempflow_operator.decisions.observed import Pod, Snapshot, TrainingJob
from tempflow_operator.decisions.reading import Reading

__all__ = ["Obstacle", "Reading", "next_status", "stored_form"]


@dataclass(frozen=True)
class Obstacle:
    """Why what was decided could not be done."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class _Fact:
    """A condition's content."""

    status: bool
    reason: Reason
    message: str = ""


def next_status(
    job: TrainingJob,
    seen: Snapshot,
    ledger: Ledger,
    *,
    reading: Reading | None,
    words: LastWords | None,
    obstacle: Obstacle | None,
    released: bool,
    now: float,
) -> JobStatus:
    """The whole status; ``words`` are what the newest attempt left behind, ``released`` says that
    no attempt holds anything any more.

    Equal inputs give an equal status, whatever ``now`` is: it dates transitions and nothing else.
    """
    old = job.status
    pods = seen.pods_of(ledger.attempt)
    checkpoint = _checkpoint(job, ledger, reading, words)
    progress = _progress(job, ledger, reading, checkpoint)
    current = ledger.current
    facts = {
        ConditionType.SUSPENDED: _suspended(job, ledger, released=released),
        ConditionType.RUNNING: _obstructed(obstacle)
        or _running(job, seen, ledger, reading, released=released),
        ConditionType.CHECKPOINTED: _checkpointed(checkpoint),
        **_outcome(ledger, released=released),
    }
    conditions = _conditions(old.conditions, facts, generation=job.generation, now=now)
    return JobStatus(
        phase=phase_of(conditions),
        observed_generation=job.generation,
        conditions=conditions,
        attempt=ledger.attempt,
        attempt_started_at=current.start_time if current is not None else None,
        next_attempt_at=_timestamp(ledger.next_attempt_at),
        active_seconds=ledger.active_seconds,
        replicas=_replicas(seen, ledger, pods),
        restarts=ledger.restarts,
        start_time=old.start_time or (current.start_time if current is not None else None),
        completion_time=_timestamp(ledger.end.time) if ledger.end is not None else None,
        progress=progress,
        progress_text=f"{progress.epoch}/{progress.epochs}" if progress is not None else "",
        progress_moved_at=_timestamp(stall.moved_at(job, reading, now)),
        checkpoint=checkpoint,
        attempts=list(ledger.attempts),
    )


def _timestamp(moment: float | None) -> str | None:
    return None if moment is None else instants.timestamp(moment)


def _conditions(
    old: list[Condition], facts: dict[ConditionType, _Fact], *, generation: int, now: float
) -> list[Condition]:
    conditions = old
    for kind, fact in facts.items():
        conditions = set_condition(
            conditions,
            kind,
            fact.status,
            fact.reason,
            fact.message,
            now=instants.timestamp(now),
            generation=generation,
        )
    return conditions


def _replicas(seen: Snapshot, ledger: Ledger, pods: tuple[Pod, ...]) -> Replicas:
    gang = seen.gang(ledger.attempt)
    return Replicas(
        desired=gang.nodes if ledger.open and gang is not None else 0,
        running=sum(pod.phase == "Running" for pod in pods),
        succeeded=sum(pod.phase == "Succeeded" for pod in pods),
        failed=sum(pod.phase == "Failed" for pod in pods),
    )


def _suspended(job: TrainingJob, ledger: Ledger, *, released: bool) -> _Fact:
    if ledger.end is not None or not job.suspend:
        return _Fact(False, Reason.NOT_SUSPENDED)
    if not released:
        return _Fact(False, Reason.SUSPENDING, "pods write a last checkpoint and stop")
    return _Fact(True, Reason.SUSPENDED_BY_USER, "no pod is left")


def _checkpointed(checkpoint: LastCheckpoint | None) -> _Fact:
    if checkpoint is None:
        return _Fact(False, Reason.NOT_YET)
    return _Fact(True, Reason.COMMITTED, f"after epoch {checkpoint.epoch}")


def _outcome(ledger: Ledger, *, released: bool) -> dict[ConditionType, _Fact]:
    end, not_yet = ledger.end, _Fact(False, Reason.NOT_YET)
    if end is None:
        succeeded = failed = finished = not_yet
    elif end.succeeded:
        succeeded = _Fact(True, end.reason, end.message)
        failed = _Fact(False, Reason.SUCCEEDED)
        finished = _Fact(True, Reason.SUCCEEDED)
    else:
        succeeded = _Fact(False, Reason.FAILED)
        failed = _Fact(True, end.reason, end.message)
        finished = _Fact(True, Reason.FAILED, end.message)
    if end is not None and not released:
        finished = _Fact(False, Reason.STOPPING, "its pods are stopping")
    return {
        ConditionType.SUCCEEDED: succeeded,
        ConditionType.FAILED: failed,
        ConditionType.FINISHED: finished,
    }


def _obstructed(obstacle: Obstacle | None) -> _Fact | None:
    """What stands in the way, as the content of the condition ``Running``."""
    return None if obstacle is None else _Fact(False, obstacle.reason, obstacle.message)


def _running(
    job: TrainingJob, seen: Snapshot, ledger: Ledger, reading: Reading | None, *, released: bool
) -> _Fact:
    if ledger.end is not None:
        return _Fact(False, ledger.end.reason, ledger.end.message)
    if ledger.open:
        return _attempt_runs(job, seen, ledger, reading)
    if job.suspend:
        reason = Reason.SUSPENDED_BY_USER if released else Reason.SUSPENDING
        return _Fact(False, reason)
    if ledger.attempt == 0:
        return _Fact(False, Reason.PENDING)
    reason = _own_reason(ledger) or (Reason.RESTARTING if released else Reason.STOPPING)
    return _Fact(False, reason, _after(ledger, _due(ledger) if released else STOPPING))


STOPPING = "its pods are stopping"


def _own_reason(ledger: Ledger) -> Reason | None:
    """Of an ending that people can do something about before the next attempt ends likewise."""
    current = ledger.current
    if current is None or current.failure is None:
        return None
    if current.outcome == "Unfit":
        return Reason.PREFLIGHT_FAILED
    return Reason.STALLED if current.failure.reason == Reason.STALLED else None


def _due(ledger: Ledger) -> str:
    if ledger.next_attempt_at is None:
        return "the next one starts"
    return f"the next one starts at {instants.timestamp(ledger.next_attempt_at)}"


def _after(ledger: Ledger, then: str) -> str:
    current = ledger.current
    if current is None:
        return then
    cause = f": {failure.sentence(current.failure)}" if current.failure is not None else ""
    return f"attempt {current.number} {current.outcome.lower()}{cause}; {then}"


def _attempt_runs(
    job: TrainingJob, seen: Snapshot, ledger: Ledger, reading: Reading | None
) -> _Fact:
    gang = seen.gang(ledger.attempt)
    pods = seen.pods_of(ledger.attempt)
    if gang is None:
        return _Fact(False, Reason.PODS_STARTING, "the pods are being created")
    if gang.queued:
        return _Fact(False, Reason.QUEUED, "the queue has not admitted this attempt")
    running, complete = hindrance.how_many_run(gang, pods)
    look = hindrance.of_servers if complete else hindrance.of_attempt
    told = look(seen, ledger.attempt)
    if told is not None:
        return _Fact(False, told.reason, told.message)
    if complete:
        note = _note(job, seen, ledger, reading)
        return _Fact(True, Reason.PODS_RUNNING, f"{gang.nodes} of {gang.nodes} pods run{note}")
    return _Fact(False, Reason.PODS_STARTING, f"{running} of {gang.nodes} pods run")


def _note(job: TrainingJob, seen: Snapshot, ledger: Ledger, reading: Reading | None) -> str:
    """What else to say of an attempt that runs."""
    unserved = hindrance.unserved(job.spec, seen, ledger.attempt) if job.spec is not None else []
    if unserved:
        return f"; no server is ready yet for {', '.join(unserved)}"
    problem = reading.problem if reading is not None else ""
    return f"; progress cannot be read: {problem}" if problem else ""


def _progress(
    job: TrainingJob, ledger: Ledger, reading: Reading | None, checkpoint: LastCheckpoint | None
) -> Progress | None:
    progress = job.status.progress
    if reading is not None and reading.progress is not None and ledger.attempt:
        progress = reading.progress
    if progress is None or ledger.open:
        return progress
    if checkpoint is not None:
        commit = {"checkpoint_epoch": checkpoint.epoch, "checkpoint_uri": checkpoint.uri}
        progress = progress.model_copy(update=commit)
    if ledger.end is not None and ledger.end.succeeded:
        # The pods are gone before they could be asked a last time; their success says as much.
        done = {"epoch": progress.epochs, "phase": "done", "eta_seconds": None}
        progress = progress.model_copy(update=done)
    return progress


def _checkpoint(
    job: TrainingJob, ledger: Ledger, reading: Reading | None, words: LastWords | None
) -> LastCheckpoint | None:
    """The newest complete checkpoint. An attempt that has just started knows of none yet, and one
    that resumed from an older one is right: what it reports replaces what was known.

    An attempt that has ended may have committed once more after it was last asked, and deleted
    what it had named before. What it left behind says so; where that is lost the run's folder is
    named, in which the newest one is found.
    """
    stored = job.status.checkpoint
    told = _reported(reading) or stored
    if ledger.open or ledger.attempt == 0:
        return told
    if words is not None:
        return LastCheckpoint(epoch=words.checkpoint_epoch, uri=words.checkpoint_uri)
    if ledger.end is not None and ledger.end.succeeded and job.spec is not None:
        # No success is told without the checkpoint after the last epoch.
        epochs = job.spec.algorithm.epochs
        if stored is not None and stored.epoch == epochs:
            return stored
        return LastCheckpoint(epoch=epochs, uri=_run(job))
    if told is not None and _has_just_ended(job, ledger):
        return LastCheckpoint(epoch=told.epoch, uri=_run(job))
    return stored


def _reported(reading: Reading | None) -> LastCheckpoint | None:
    progress = reading.progress if reading is not None else None
    if progress is None or progress.checkpoint_epoch is None:
        return None
    return LastCheckpoint(epoch=progress.checkpoint_epoch, uri=progress.checkpoint_uri)


def _has_just_ended(job: TrainingJob, ledger: Ledger) -> bool:
    """Whether status, as it is stored, does not know yet that the newest attempt has ended."""
    recorded = {attempt.number: attempt.outcome for attempt in job.status.attempts}
    return recorded.get(ledger.attempt, "Active") == "Active"


def _run(job: TrainingJob) -> str | None:
    """The run's folder."""
    if job.spec is None or job.spec.checkpoint.uri is None:
        return None
    return f"{job.spec.checkpoint.uri.rstrip('/')}/{job.run_id}"


def stored_form(status: JobStatus) -> dict[str, object]:
    """The status as the API server stores it: what is unknown is left out."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)
