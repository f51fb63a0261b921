"""The attempts of a job so far: what status has recorded, brought up to date by what is seen.

Every transition is recorded by one status write and derived again if that write is lost, so a
crash at any point repeats a decision and never counts twice.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from tempflow_api.conditions import ConditionType, Reason, find
from tempflow_api.status import Attempt, Failure, JobStatus, Restarts
from tempflow_operator.decisions import failure, hindrance, instants, stall
from tempflow_operator.decisions.failure import Ending, FailureClass
from tempflow_operator.decisions.observed import Gang, Pod, Snapshot, TrainingJob
from tempflow_operator.decisions.reading import Reading
from tempflow_operator.settings import Timing

HISTORY = 10

Outcome = Literal["Active", "Succeeded", "Failed", "Disrupted", "Suspended", "Cancelled", "Unfit"]


class End(NamedTuple):
    """How the whole job ended."""

    succeeded: bool
    reason: Reason
    message: str
    time: float


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The accounts of a job."""

    attempt: int = 0
    attempts: tuple[Attempt, ...] = ()
    restarts: Restarts = field(default_factory=Restarts)
    active_seconds: int = 0
    next_attempt_at: float | None = None
    end: End | None = None

    @property
    def current(self) -> Attempt | None:
        """The record of the newest attempt."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.number == self.attempt else None

    @property
    def open(self) -> bool:
        """Whether an attempt is under way."""
        return self.end is None and self.current is not None and self.current.outcome == "Active"


def bring_up_to_date(
    job: TrainingJob,
    seen: Snapshot,
    problems: tuple[str, ...],
    now: float,
    timing: Timing,
    reading: Reading | None = None,
) -> Ledger:
    """The recorded accounts, with everything entered that has happened since."""
    ledger = recorded(job.status)
    if ledger.end is not None:
        return ledger
    ledger = _settle(ledger, job, seen, now, timing, reading)
    newest = seen.newest_attempt
    if newest > ledger.attempt:
        # Created by a pass whose status write was lost.
        ledger = _settle(opened(ledger, newest), job, seen, now, timing, reading)
    if job.cancel and ledger.end is None:
        return _give_up(ledger, Reason.CANCELLED, "by spec.runPolicy.cancel", now)
    if problems and not ledger.open and ledger.end is None and not job.suspend:
        # Only where an attempt would start: what runs does not end because the operator changed.
        ledger = _give_up(ledger, Reason.SPEC_INVALID, "; ".join(problems), now)
    return ledger


def recorded(status: JobStatus) -> Ledger:
    """What status says."""
    return Ledger(
        attempt=status.attempt,
        attempts=tuple(status.attempts),
        restarts=status.restarts,
        active_seconds=status.active_seconds,
        next_attempt_at=(
            instants.seconds(status.next_attempt_at) if status.next_attempt_at else None
        ),
        end=_recorded_end(status),
    )


def _recorded_end(status: JobStatus) -> End | None:
    for kind in (ConditionType.SUCCEEDED, ConditionType.FAILED):
        why = find(status.conditions, kind)
        if why is not None and why.status == "True":
            return End(
                kind is ConditionType.SUCCEEDED,
                Reason(why.reason) if why.reason in set(Reason) else Reason.FAILED,
                why.message,
                instants.seconds(status.completion_time or why.last_transition_time),
            )
    return None


def opened(ledger: Ledger, number: int) -> Ledger:
    """With attempt ``number`` under way; one that is still open was overtaken."""
    if ledger.open:
        ledger = _closed(ledger, "Cancelled", None, Failure(reason="Overtaken"))
    started = Attempt(number=number, outcome="Active")
    return replace(
        ledger,
        attempt=number,
        attempts=(*ledger.attempts, started)[-HISTORY:],
        next_attempt_at=None,
    )


def _settle(
    ledger: Ledger,
    job: TrainingJob,
    seen: Snapshot,
    now: float,
    timing: Timing,
    reading: Reading | None,
) -> Ledger:
    """``ledger`` with the open attempt ended, if anything has ended it.

    What the gang itself says comes first: a job that completes in the moment in which it is
    suspended, or in which its deadline passes, has completed.
    """
    if not ledger.open:
        return ledger
    gang = seen.gang(ledger.attempt)
    if gang is None:
        if job.suspend:
            return _closed(ledger, "Suspended", now, None)
        return _failed(ledger, job, seen, Gang(name="", uid="", attempt=0), now, timing)
    pods = seen.pods_of(ledger.attempt)
    ledger = _with_running(_with_start(ledger, gang, now), job, seen, gang, now)
    if gang.completed_at is not None:
        done = _closed(ledger, "Succeeded", gang.completed_at, None)
        end = End(True, Reason.COMPLETED, "all epochs are trained", gang.completed_at)
        return replace(done, end=end)
    if gang.failing is not None:
        return _failed(ledger, job, seen, gang, gang.failing.time or now, timing)
    if _deadline_passed(ledger, job, now):
        cause = Failure(reason=Reason.DEADLINE_EXCEEDED.value)
        return _give_up(
            _closed(ledger, "Failed", now, cause), Reason.DEADLINE_EXCEEDED, _deadline(job), now
        )
    if job.suspend:
        return _closed(ledger, "Suspended", now, None)
    if gang.deleting or (not gang.queued and _is_lost(pods, now, timing)):
        return _failed(ledger, job, seen, gang, now, timing)
    return _overdue(ledger, job, seen, now, timing, reading)


def _is_lost(pods: tuple[Pod, ...], now: float, timing: Timing) -> bool:
    """Whether a pod stands on a node that is gone. The Job controller waits for its end for ever,
    and where it was the only one, or its peers do not notice, so would the job."""
    overdue = (pod.lost_at(timing.lost_node) for pod in pods)
    return any(moment is not None and moment <= now for moment in overdue)


def _overdue(
    ledger: Ledger,
    job: TrainingJob,
    seen: Snapshot,
    now: float,
    timing: Timing,
    reading: Reading | None,
) -> Ledger:
    """Ended, if it does not begin or does not get on."""
    due = starts_by(ledger, job)
    if due is not None and now >= due:
        why = _why_not_running(job, seen, ledger.attempt)
        message = f"not all pods ran within spec.runPolicy.preRunningDeadlineSeconds: {why}"
        reason = Reason.PRE_RUNNING_DEADLINE_EXCEEDED
        cause = Failure(reason=reason.value, message=message[:4096])
        return _give_up(_closed(ledger, "Failed", now, cause), reason, message, now)
    due = stall.stalls_at(job, ledger.attempt, reading, now)
    if due is not None and now >= due and reading is not None and reading.progress is not None:
        progress = reading.progress
        message = f"no progress since epoch {progress.epoch} of {progress.epochs}, {progress.phase}"
        cause = Failure(reason=Reason.STALLED.value, message=message)
        return _ended(ledger, job, Ending(FailureClass.RETRIABLE, cause), now, timing)
    return ledger


def _why_not_running(job: TrainingJob, seen: Snapshot, attempt: int) -> str:
    told = hindrance.of_attempt(seen, attempt)
    if told is not None:
        return told.message
    unserved = hindrance.unserved(job.spec, seen, attempt) if job.spec is not None else []
    if unserved:
        return f"no server is ready yet for {', '.join(unserved)}"
    return "the cluster does not say why"


def _with_start(ledger: Ledger, gang: Gang, now: float) -> Ledger:
    """The start of the open attempt. A queue may take the pods back and admit them again: the
    attempt then starts anew, and how long its pods were there is kept in the accounts."""
    current = ledger.current
    if current is None:
        return ledger
    start = None if gang.start_time is None else instants.timestamp(gang.start_time)
    if start == current.start_time or (start is None and not gang.queued):
        return ledger
    spent = 0
    if start is None and current.start_time is not None:
        spent = max(0, int(now - instants.seconds(current.start_time)))
    update = {"start_time": start, "running_time": None}
    ledger = _replaced(ledger, current.model_copy(update=update))
    return replace(ledger, active_seconds=ledger.active_seconds + spent)


def _with_running(
    ledger: Ledger, job: TrainingJob, seen: Snapshot, gang: Gang, now: float
) -> Ledger:
    """With the moment from which all ranks run and all rewards are served."""
    current = ledger.current
    if current is None or current.start_time is None or current.running_time is not None:
        return ledger
    _, complete = hindrance.how_many_run(gang, seen.pods_of(ledger.attempt))
    if not complete or (job.spec and hindrance.unserved(job.spec, seen, ledger.attempt)):
        return ledger
    update = {"running_time": instants.timestamp(now)}
    return _replaced(ledger, current.model_copy(update=update))


def _failed(
    ledger: Ledger, job: TrainingJob, seen: Snapshot, gang: Gang, at: float, timing: Timing
) -> Ledger:
    return _ended(ledger, job, failure.classify(gang, seen.pods_of(ledger.attempt)), at, timing)


_OUTCOMES: dict[FailureClass, Outcome] = {
    FailureClass.DISRUPTION: "Disrupted",
    FailureClass.PREFLIGHT: "Unfit",
}
_COUNTERS = {
    FailureClass.DISRUPTION: "disruptions",
    FailureClass.PREFLIGHT: "preflights",
    FailureClass.RETRIABLE: "failures",
}
_EXHAUSTED = {
    FailureClass.PREFLIGHT: Reason.PREFLIGHT_RESTARTS_EXHAUSTED,
    FailureClass.RETRIABLE: Reason.RESTARTS_EXHAUSTED,
}


def _ended(ledger: Ledger, job: TrainingJob, ending: Ending, at: float, timing: Timing) -> Ledger:
    kind, cause = ending
    ledger = _closed(ledger, _OUTCOMES.get(kind, "Failed"), at, cause)
    if kind is FailureClass.PERMANENT:
        return _give_up(ledger, Reason.PERMANENT_FAILURE, failure.sentence(cause), at)
    counter = _COUNTERS[kind]
    used: int = getattr(ledger.restarts, counter)
    allowed = _allowed(kind, job)
    if allowed is not None and used >= allowed:
        told = f"{failure.sentence(cause)} (restarts used: {used} of {allowed})"
        return _give_up(ledger, _EXHAUSTED[kind], told, at)
    restarts = ledger.restarts.model_copy(update={counter: used + 1})
    wait = failure.pause(kind, used + 1, timing, salt=f"{job.uid}/{ledger.attempt}")
    return replace(ledger, restarts=restarts, next_attempt_at=at + wait)


def _allowed(kind: FailureClass, job: TrainingJob) -> int | None:
    """How many further attempts endings of that class may have; None for any number. A
    specification that cannot be read has its own end, which says so."""
    if kind is FailureClass.DISRUPTION or job.spec is None:
        return None
    policy = job.spec.run_policy
    return policy.max_preflight_restarts if kind is FailureClass.PREFLIGHT else policy.max_restarts


def _closed(ledger: Ledger, outcome: Outcome, at: float | None, cause: Failure | None) -> Ledger:
    current = ledger.current
    if current is None:
        return ledger
    start = instants.seconds(current.start_time) if current.start_time else None
    spent = max(0, int(at - start)) if at is not None and start is not None else 0
    record = Attempt(
        number=current.number,
        outcome=outcome,
        start_time=current.start_time,
        running_time=current.running_time,
        end_time=None if at is None else instants.timestamp(max(at, start or at)),
        failure=cause,
    )
    return replace(_replaced(ledger, record), active_seconds=ledger.active_seconds + spent)


def _replaced(ledger: Ledger, record: Attempt) -> Ledger:
    return replace(ledger, attempts=(*ledger.attempts[:-1], record))


def _give_up(ledger: Ledger, reason: Reason, message: str, at: float) -> Ledger:
    if ledger.open:
        ledger = _closed(ledger, "Cancelled", at, None)
    return replace(ledger, end=End(False, reason, message, at), next_attempt_at=None)


def deadline_at(ledger: Ledger, job: TrainingJob) -> float | None:
    """When the job has been active for as long as it may, if the current attempt runs on. Pauses
    between attempts, suspension and time in a queue do not count."""
    limit = job.spec.run_policy.active_deadline_seconds if job.spec is not None else None
    current = ledger.current
    if limit is None or not ledger.open or current is None or current.start_time is None:
        return None
    return instants.seconds(current.start_time) + limit - ledger.active_seconds


def starts_by(ledger: Ledger, job: TrainingJob) -> float | None:
    """When all pods of the open attempt have to run, if they do not yet. A queue's time is not
    counted: it decides when the attempt starts."""
    limit = job.spec.run_policy.pre_running_deadline_seconds if job.spec is not None else None
    current = ledger.current
    if limit is None or not ledger.open or current is None or current.start_time is None:
        return None
    if current.running_time is not None:
        return None
    return instants.seconds(current.start_time) + limit


def _deadline_passed(ledger: Ledger, job: TrainingJob, now: float) -> bool:
    due = deadline_at(ledger, job)
    return due is not None and now >= due


def _deadline(job: TrainingJob) -> str:
    limit = job.spec.run_policy.active_deadline_seconds if job.spec is not None else None
    return f"active for spec.runPolicy.activeDeadlineSeconds ({limit})"
