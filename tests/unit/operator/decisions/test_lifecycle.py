"""What bounds an attempt in time, what it leaves behind, and who else has a say in it."""

from dataclasses import replace

import pytest

from tempflow_api.conditions import ConditionType, Reason
from tempflow_api.termination import LastWords, compose
from tempflow_operator import settings as configuration
from tempflow_operator.decisions.plan import Action, Delete
from tempflow_operator.decisions.status import Reading, stored_form
from tests.builders import (
    at,
    make_gang,
    make_job,
    make_pod,
)
from tests.unit.operator.decisions.stories import (
    SETTINGS,
    START,
    Story,
    failed_gang,
    kinds,
    progress,
    started,
)


def words(
    epoch: int, *, attempt: int = 1, incarnation: int = 1, run_id: str = "team/demo-11111111"
) -> LastWords:
    return LastWords(
        run_id=run_id,
        attempt=attempt,
        incarnation=incarnation,
        checkpoint_epoch=epoch,
        checkpoint_uri=f"s3://bucket/{epoch}",
    )


class TestTheLastCheckpoint:
    """An attempt commits once more when it is asked to stop, and deletes what it named before."""

    RUN = "s3://bucket/runs/team/demo-11111111"

    def ending(self, *, heard: LastWords | None = None, message: str = "") -> Story:
        story = started()
        reading = Reading(progress(epoch=1, checkpoint=1))
        story.look(make_gang().started(), make_pod().running(), parts=(1,), reading=reading)
        story.look(failed_gang(), make_pod().failed(90, message), seconds=100, heard=heard)
        return story

    def named(self, story: Story) -> tuple[int, str | None]:
        assert story.status.checkpoint is not None
        assert story.status.progress is not None
        checkpoint, progress = story.status.checkpoint, story.status.progress
        assert progress.checkpoint_uri == checkpoint.uri
        return checkpoint.epoch, checkpoint.uri

    def test_is_what_the_pod_left_behind(self) -> None:
        story = self.ending(message=compose(words(2), "stopped"))
        assert self.named(story) == (2, "s3://bucket/2")
        failure = story.status.attempts[0].failure
        assert failure is not None
        assert failure.message == "stopped"

    def test_is_what_the_watch_told_of_a_pod_that_is_gone(self) -> None:
        story = self.ending(heard=words(2))
        assert self.named(story) == (2, "s3://bucket/2")
        story.look(failed_gang(), seconds=101)
        assert self.named(story) == (2, "s3://bucket/2")

    @pytest.mark.parametrize(
        "heard",
        [
            None,
            words(2, attempt=7),
            words(2, run_id="team/other-11111111"),
            words(2, incarnation=0),  # of a start before the one that told its progress
        ],
    )
    def test_is_looked_for_in_the_run_where_nothing_tells(self, heard: LastWords | None) -> None:
        story = self.ending(heard=heard)
        assert self.named(story) == (1, self.RUN)
        story.look(failed_gang(), seconds=101)
        assert self.named(story) == (1, self.RUN)

    def test_may_be_told_late(self) -> None:
        story = self.ending()
        story.look(failed_gang(), seconds=101, heard=words(2))
        assert self.named(story) == (2, "s3://bucket/2")

    def test_of_a_success_is_that_after_the_last_epoch(self) -> None:
        story = started()
        story.look(make_gang().started().complete(), heard=words(2))
        assert story.status.checkpoint is not None
        assert story.status.checkpoint.uri == "s3://bucket/2"
        story.look(make_gang().started().complete(), seconds=10)
        assert story.status.checkpoint.uri == "s3://bucket/2"


class TestThePreRunningDeadline:
    def story(self) -> Story:
        return started(make_job().spec("runPolicy.preRunningDeadlineSeconds", 100))

    def test_ends_what_does_not_begin_and_says_why(self) -> None:
        story = self.story()
        gang = make_gang().started(10)
        pod = make_pod().waiting("ImagePullBackOff", "no such image")
        story.look(gang, pod, parts=(1,), seconds=20)
        assert story.again_in == 90
        story.look(gang, pod, parts=(1,), seconds=110)
        assert story.reason(ConditionType.FAILED) == Reason.PRE_RUNNING_DEADLINE_EXCEEDED
        assert "pod demo-a1-0-x: no such image" in story.message(ConditionType.FAILED)

    def test_is_over_once_all_pods_have_run(self) -> None:
        story = self.story()
        gang = make_gang().started(10)
        story.look(gang, make_pod().running(), parts=(1,), seconds=50)
        assert story.status.attempts[0].running_time == at(50)
        assert story.again_in is None
        story.look(gang, make_pod(), parts=(1,), seconds=500)
        assert story.status.attempts[0].outcome == "Active"

    def test_does_not_count_time_in_a_queue(self) -> None:
        story = self.story()
        story.look(make_gang().started(), make_pod(), parts=(1,), seconds=50)
        story.look(make_gang().queued(), parts=(1,), seconds=500)
        assert story.again_in is None
        story.look(make_gang().started(900), make_pod(), parts=(1,), seconds=910)
        assert story.status.attempt == 1
        assert story.again_in == 90

    def test_counts_anew_after_a_queue_took_running_pods_back(self) -> None:
        story = self.story()
        story.look(make_gang().started(), make_pod().running(), parts=(1,), seconds=50)
        story.look(make_gang().queued(), parts=(1,), seconds=500)
        story.look(make_gang().started(900), make_pod(), parts=(1,), seconds=910)
        assert story.again_in == 90


class TestStalls:
    def story(self) -> Story:
        story = started(make_job().spec("runPolicy.stallTimeoutSeconds", 60))
        self.look(story, 0, Reading(progress(epoch=1)))
        return story

    def look(self, story: Story, seconds: float, reading: Reading | None) -> list[Action]:
        gang, pod = make_gang().started(), make_pod().running()
        return story.look(gang, pod, parts=(1,), seconds=seconds, reading=reading)

    def test_an_attempt_that_stands_still_is_ended_as_a_failure(self) -> None:
        story = self.story()
        assert story.status.progress_moved_at == at(0)
        self.look(story, 59, Reading(progress(epoch=1)))
        assert (story.phase, story.again_in) == ("Running", 1)
        actions = self.look(story, 60, Reading(progress(epoch=1)))
        assert Delete("Job", "demo-a1", "gang-1") in actions
        assert (story.phase, story.running) == ("Restarting", Reason.STALLED)
        assert "no progress since epoch 1 of 2, rollout" in story.message(ConditionType.RUNNING)
        assert story.status.restarts.failures == 1
        assert "demo-a2" in {action.name for action in story.look(seconds=200)}

    def test_what_moves_in_the_last_moment_does_not_stall(self) -> None:
        story = self.story()
        self.look(story, 500, Reading(progress(epoch=2)))
        assert (story.phase, story.again_in) == ("Running", 60)

    @pytest.mark.parametrize(
        "reading",
        [
            None,
            Reading(None, "no connection"),
            Reading(progress(epoch=1), "no answer in time"),
            Reading(progress(epoch=1, attempt=7)),
            Reading(progress(epoch=1).model_copy(update={"phase": "checkpoint"})),
        ],
    )
    def test_what_cannot_be_read_or_saves_does_not_stall(self, reading: Reading | None) -> None:
        story = self.story()
        self.look(story, 1, reading)
        self.look(story, 10_000, reading)
        assert story.phase == "Running"


class TestPreflight:
    def test_an_unfit_node_uses_no_restart(self) -> None:
        story = started(make_job().max_restarts(0))
        lost = make_pod(rank=1).failed(90, "lost a peer", seconds=80)
        story.look(failed_gang(), make_pod().failed(91, "no GPU"), lost, seconds=100)
        assert (story.phase, story.running) == ("Restarting", Reason.PREFLIGHT_FAILED)
        assert "no GPU" in story.message(ConditionType.RUNNING)
        assert story.status.attempts[0].outcome == "Unfit"
        restarts = story.status.restarts
        assert (restarts.failures, restarts.disruptions, restarts.preflights) == (0, 0, 1)
        assert kinds(story.look(failed_gang(), seconds=200)) == START

    def test_it_is_not_tried_for_ever(self) -> None:
        story = started(make_job().spec("runPolicy.maxPreflightRestarts", 0))
        story.look(failed_gang(), make_pod().failed(91, "no GPU"), seconds=100)
        assert story.phase == "Failed"
        assert story.reason(ConditionType.FAILED) == Reason.PREFLIGHT_RESTARTS_EXHAUSTED
        assert "no GPU (restarts used: 0 of 0)" in story.message(ConditionType.FAILED)
        assert story.look(failed_gang(), seconds=9_999) == []

    def test_pods_that_are_gone_have_told_the_job(self) -> None:
        story = started()
        message = "Container trainer for pod team/demo-a1-0 failed with exit code 91 matching ..."
        gang = make_gang().started().failed(reason="PodFailurePolicy", message=message)
        story.look(gang, seconds=100)
        assert story.running == Reason.PREFLIGHT_FAILED


class TestLostStatus:
    def test_an_end_is_recorded_before_the_next_attempt_starts(self) -> None:
        """No pass since the first one's creations has lived to write status."""
        story = Story(make_job())
        gang = failed_gang()
        actions = story.look(gang, parts=(1,), seconds=9_999)
        assert not [action for action in actions if not isinstance(action, Delete)]
        assert [attempt.outcome for attempt in story.status.attempts] == ["Failed"]
        assert story.again_in is not None
        assert story.again_in <= 0
        assert kinds(story.look(gang, seconds=10_000)) == START
        assert [attempt.outcome for attempt in story.status.attempts] == ["Failed", "Active"]
        assert story.status.restarts.failures == 1


class TestAnUpgrade:
    def test_what_an_older_operator_started_is_left_alone(self) -> None:
        """Its status knows fewer fields, and its pods look otherwise than this one's would."""
        story = started()
        gang, pod = make_gang().started(), make_pod().running()
        story.look(gang, pod, parts=(1,), seconds=5)
        old = stored_form(story.status)
        old.pop("progressMovedAt", None)
        for attempt in old["attempts"]:  # type: ignore[attr-defined]  # a list
            attempt.pop("runningTime")
        story.job.with_status(old)
        pods = configuration.Pods(image="newer:2", gang_scheduler="volcano")
        story.settings = replace(SETTINGS, pods=pods)
        actions = story.look(gang, pod, parts=(1,), seconds=50)
        assert all(action.kind != "Job" for action in actions)
        assert (story.phase, story.status.attempt) == ("Running", 1)


def test_a_job_of_somebody_else() -> None:
    job = make_job()
    assert job.typed().ours
    assert job.spec("managedBy", "tempflow.dev/operator").typed().ours
    assert not job.spec("managedBy", "kueue.x-k8s.io/multikueue").typed().ours
    assert not job.spec("algorithm.epochs", 0).typed().ours
