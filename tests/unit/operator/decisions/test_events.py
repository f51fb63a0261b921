"""What is told, and how often."""

import pytest

from tempflow_api.conditions import ConditionType, Reason, set_condition
from tempflow_api.status import Attempt, Condition, Failure, JobStatus
from tempflow_operator.decisions.events import Event, Series, Tell, between
from tests.builders import at

NEWS = Event("Warning", "RequestRefused", "quota")


def condition(kind: ConditionType, reason: Reason, *, status: bool = False) -> list[Condition]:
    return set_condition([], kind, status, reason, "why", now=at(0), generation=1)


class TestBetween:
    def test_nothing_new_is_no_news(self) -> None:
        status = JobStatus(
            conditions=condition(ConditionType.RUNNING, Reason.UNSCHEDULABLE),
            attempts=[Attempt(number=1, outcome="Failed")],
        )
        assert between(status, status) == []

    def test_an_attempt_begins_and_ends(self) -> None:
        begun = JobStatus(attempts=[Attempt(number=1, outcome="Active")])
        cause = Failure(pod="p", exit_code=137, reason="OOMKilled")
        ended = JobStatus(attempts=[Attempt(number=1, outcome="Failed", failure=cause)])
        assert between(JobStatus(), begun) == [Event("Normal", "AttemptStarted", "attempt 1")]
        assert between(begun, ended) == [
            Event("Warning", "AttemptFailed", "attempt 1: pod p: exit code 137 (OOMKilled)")
        ]

    def test_one_that_nobody_saw_is_told_whole(self) -> None:
        ended = JobStatus(attempts=[Attempt(number=4, outcome="Disrupted")])
        assert [e.reason for e in between(JobStatus(), ended)] == [
            "AttemptStarted",
            "AttemptDisrupted",
        ]

    @pytest.mark.parametrize(
        ("kind", "reason", "status", "expected"),
        [
            (ConditionType.RUNNING, Reason.UNSCHEDULABLE, False, "Warning"),
            (ConditionType.RUNNING, Reason.IMAGE_PULL_FAILED, False, "Warning"),
            (ConditionType.RUNNING, Reason.CONTAINER_NOT_STARTED, False, "Warning"),
            (ConditionType.RUNNING, Reason.NAME_TAKEN, False, "Warning"),
            (ConditionType.RUNNING, Reason.REQUEST_REFUSED, False, "Warning"),
            (ConditionType.RUNNING, Reason.PODS_RUNNING, True, "Normal"),
            (ConditionType.SUSPENDED, Reason.SUSPENDED_BY_USER, True, "Normal"),
            (ConditionType.FINISHED, Reason.SUCCEEDED, True, "Normal"),
            (ConditionType.FINISHED, Reason.FAILED, True, "Warning"),
            (ConditionType.RUNNING, Reason.PODS_STARTING, False, None),
            (ConditionType.FINISHED, Reason.NOT_YET, False, None),
            (ConditionType.CHECKPOINTED, Reason.COMMITTED, True, None),
        ],
    )
    def test_conditions(
        self, kind: ConditionType, reason: Reason, status: bool, expected: str | None
    ) -> None:
        new = JobStatus(conditions=condition(kind, reason, status=status))
        assert [e.type for e in between(JobStatus(), new)] == ([expected] if expected else [])

    def test_a_condition_of_a_newer_operator_is_passed_over(self) -> None:
        strange = Condition(
            type="Stalled", status="True", reason="NoProgress", last_transition_time=at(0)
        )
        assert between(JobStatus(), JobStatus(conditions=[strange])) == []

    def test_notes_fit(self) -> None:
        cause = Failure(message="x" * 4000)
        new = JobStatus(attempts=[Attempt(number=1, outcome="Failed", failure=cause)])
        assert all(0 < len(event.note) <= 1000 for event in between(JobStatus(), new))


class TestSeries:
    def test_a_thousand_in_a_minute_are_one_write(self) -> None:
        series = Series()
        told = [series.consider("uid", NEWS, now=n * 0.06) for n in range(1000)]
        assert [tell for tell in told if tell is not None] == [Tell(NEWS, 1)]

    def test_a_thousand_in_half_an_hour_are_three(self) -> None:
        series = Series()
        told = [series.consider("uid", NEWS, now=n * 1.7) for n in range(1000)]
        writes = [tell.count for tell in told if tell is not None]
        assert len(writes) <= 3
        assert writes[0] == 1
        assert writes == sorted(writes)

    def test_after_silence_it_is_news_again(self) -> None:
        series = Series()
        assert series.consider("uid", NEWS, now=0) == Tell(NEWS, 1)
        assert series.consider("uid", NEWS, now=10_000) == Tell(NEWS, 1)

    def test_jobs_and_notes_are_told_apart(self) -> None:
        series = Series()
        other = Event("Warning", "RequestRefused", "another quota")
        told = [series.consider(uid, event, 0) for uid in "ab" for event in (NEWS, other)]
        assert all(tell is not None and tell.count == 1 for tell in told)

    def test_memory_is_bounded(self) -> None:
        series = Series(quiet=10)
        for number in range(30_000):
            series.consider(str(number), NEWS, now=number)
        assert len(series._told) <= 10_002
