"""Stories of one job, told pass by pass: what was seen, and what followed."""

from tempflow_api.conditions import ConditionType, find, is_true
from tempflow_api.status import JobStatus, Progress
from tempflow_api.termination import LastWords
from tempflow_operator import settings as configuration
from tempflow_operator.decisions import plan
from tempflow_operator.decisions.plan import Action
from tempflow_operator.decisions.status import Obstacle, Reading, next_status, stored_form
from tempflow_operator.reconcile import decide, last_words_of
from tests.builders import (
    T0,
    GangBuilder,
    JobBuilder,
    PodBuilder,
    ServersBuilder,
    at,
    make_gang,
    make_job,
    seen,
)

SETTINGS = configuration.Settings()
START = [("Create", "Service"), ("Create", "Job"), ("Create", "ConfigMap")]


class Story:
    """One job; ``look`` is a pass over what is given, with the status of the pass before."""

    def __init__(self, job: JobBuilder, settings: configuration.Settings = SETTINGS) -> None:
        self.job = job
        self.settings = settings
        self.status = JobStatus()
        self.again_in: float | None = None

    def look(
        self,
        *things: GangBuilder | PodBuilder | ServersBuilder,
        seconds: float = 0,
        parts: tuple[int, ...] = (),
        reading: Reading | None = None,
        heard: LastWords | None = None,
        obstacle: Obstacle | None = None,
    ) -> list[Action]:
        job, snapshot, now = self.job.typed(), seen(*things, parts=parts), T0 + seconds
        decision = decide(job, snapshot, now, self.settings, reading)
        accounts = decision.intended if obstacle is None else decision.accounts
        self.status = next_status(
            job,
            snapshot,
            accounts,
            reading=reading,
            words=last_words_of(job, snapshot, accounts, heard),
            obstacle=obstacle,
            released=plan.released(accounts, snapshot, now, self.settings.timing),
            now=now,
        )
        self.job.with_status(stored_form(self.status))
        due = plan.look_again_at(job, snapshot, accounts, now, self.settings.timing, reading)
        self.again_in = None if due is None else due - now
        return decision.actions

    def reason(self, kind: ConditionType) -> str:
        condition = find(self.status.conditions, kind)
        assert condition is not None
        return condition.reason

    def message(self, kind: ConditionType) -> str:
        condition = find(self.status.conditions, kind)
        assert condition is not None
        return condition.message

    @property
    def running(self) -> str:
        return self.reason(ConditionType.RUNNING)

    @property
    def phase(self) -> str:
        return self.status.phase

    @property
    def finished(self) -> bool:
        return is_true(self.status.conditions, ConditionType.FINISHED)


def kinds(actions: list[Action]) -> list[tuple[str, str]]:
    return [(type(action).__name__, action.kind) for action in actions]


def started(job: JobBuilder | None = None) -> Story:
    """A story whose first attempt has begun."""
    story = Story(job or make_job())
    assert kinds(story.look()) == START
    return story


def progress(
    *, epoch: int = 1, attempt: int = 1, incarnation: int = 1, checkpoint: int | None = None
) -> Progress:
    return Progress(
        epoch=epoch,
        epochs=2,
        phase="rollout",
        attempt=attempt,
        incarnation=incarnation,
        checkpoint_epoch=checkpoint,
        checkpoint_uri=f"s3://bucket/{checkpoint}" if checkpoint is not None else None,
        time=at(0),
    )


def failed_gang(attempt: int = 1, seconds: float = 100) -> GangBuilder:
    return make_gang(attempt).started().failed(seconds)
