"""What to tell people, once it stands in status; and how often to repeat it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tempflow_api.conditions import ConditionType, Reason, find
from tempflow_api.status import Attempt, JobStatus
from tempflow_operator.decisions import failure


@dataclass(frozen=True)
class Event:
    """One piece of news about a job."""

    type: Literal["Normal", "Warning"]
    reason: str
    note: str


_TROUBLE = frozenset(
    {
        Reason.UNSCHEDULABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.CONTAINER_NOT_STARTED,
        Reason.REWARD_NOT_SERVED,
        Reason.NAME_TAKEN,
        Reason.REQUEST_REFUSED,
    }
)
_BAD_OUTCOMES = frozenset({"Failed", "Disrupted", "Unfit"})
# The API server refuses longer notes.
_NOTE_LIMIT = 1000
_MOST_SERIES = 10_000


def between(old: JobStatus, new: JobStatus) -> list[Event]:
    """The news that ``new`` has over ``old``."""
    return [*_attempts(old, new), *_conditions(old, new)]


def _attempts(old: JobStatus, new: JobStatus) -> Iterator[Event]:
    before = {attempt.number: attempt.outcome for attempt in old.attempts}
    for attempt in new.attempts:
        known = before.get(attempt.number)
        if known is None:
            yield _event("Normal", "AttemptStarted", f"attempt {attempt.number}")
        if attempt.outcome not in ("Active", known):
            yield _ended(attempt)


def _ended(attempt: Attempt) -> Event:
    cause = f": {failure.sentence(attempt.failure)}" if attempt.failure is not None else ""
    bad = attempt.outcome in _BAD_OUTCOMES
    note = f"attempt {attempt.number}{cause}"
    return _event("Warning" if bad else "Normal", f"Attempt{attempt.outcome}", note)


def _conditions(old: JobStatus, new: JobStatus) -> Iterator[Event]:
    for condition in new.conditions:
        kind = ConditionType(condition.type) if condition.type in set(ConditionType) else None
        before = find(old.conditions, kind) if kind is not None else None
        if before is not None and before.reason == condition.reason:
            continue
        if kind is ConditionType.RUNNING and condition.reason in {*_TROUBLE, Reason.PODS_RUNNING}:
            bad = condition.reason in _TROUBLE
            yield _event("Warning" if bad else "Normal", condition.reason, condition.message)
        if kind is ConditionType.SUSPENDED and condition.reason == Reason.SUSPENDED_BY_USER:
            yield _event("Normal", condition.reason, condition.message)
        if kind is ConditionType.FINISHED and condition.status == "True":
            bad = condition.reason == Reason.FAILED
            yield _event("Warning" if bad else "Normal", condition.reason, condition.message)


def _event(kind: Literal["Normal", "Warning"], reason: str, note: str) -> Event:
    return Event(kind, reason, note[:_NOTE_LIMIT] or reason)


@dataclass(frozen=True)
class Tell:
    """Write an event: the first of its series when ``count`` is 1, else an update of it."""

    event: Event
    count: int


@dataclass
class Series:
    """Counts equal events of one job, so that a thousand of them are a handful of writes."""

    quiet: float = 600.0
    """Seconds between two writes of one series, and after which a series is over."""
    _told: dict[tuple[str, Event], tuple[int, float]] = field(default_factory=dict)

    def consider(self, uid: str, event: Event, now: float) -> Tell | None:
        """What to write about ``event`` of the job with that UID."""
        self._prune(now)
        key = (uid, event)
        count, told_at = self._told.get(key, (0, float("-inf")))
        over = now - told_at >= self.quiet
        if count == 0 or (over and count == 1):
            self._told[key] = (1, now)
            return Tell(event, 1)
        count += 1
        self._told[key] = (count, now if over else told_at)
        return Tell(event, count) if over else None

    def _prune(self, now: float) -> None:
        """Forget series that are over, once there are many: jobs come and go."""
        if len(self._told) > _MOST_SERIES:
            young = now - 2 * self.quiet
            self._told = {key: told for key, told in self._told.items() if told[1] > young}
