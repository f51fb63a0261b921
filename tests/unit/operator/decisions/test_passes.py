"""Stories of one job, pass by pass: what is done, and what status says then."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tempflow_api.conditions import ConditionType, Reason, is_true
from tempflow_operator import settings as configuration
from tempflow_operator.decisions.plan import Create, Delete
from tempflow_operator.decisions.status import Obstacle, Reading
from tests.builders import (
    UID,
    JobBuilder,
    PodBuilder,
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


class TestTheFirstPass:
    def test_starts_attempt_one(self) -> None:
        story = Story(make_job())
        actions = story.look()
        assert kinds(actions) == START
        assert [action.name for action in actions] == ["demo-a1", "demo-a1", "demo-a1-11111111"]
        assert (story.status.attempt, story.status.phase) == (1, "Starting")

    def test_sets_every_condition_with_its_generation(self) -> None:
        story = started()
        assert {c.type for c in story.status.conditions} == {kind.value for kind in ConditionType}
        assert {c.observed_generation for c in story.status.conditions} == {1}
        assert {c.last_transition_time for c in story.status.conditions} == {at(0)}

    def test_of_a_suspended_job_starts_nothing(self) -> None:
        story = Story(make_job().suspended())
        assert story.look() == []
        assert (story.status.phase, story.running) == ("Suspended", Reason.SUSPENDED_BY_USER)

    def test_of_a_job_that_is_being_deleted_does_nothing(self) -> None:
        assert Story(make_job().deleting()).look() == []

    def test_goes_on_where_another_was_cut_off(self) -> None:
        story = Story(make_job())
        actions = story.look(make_gang().started())
        assert kinds(actions) == [("Create", "Service"), ("Create", "ConfigMap")]
        assert story.status.attempt == 1

    def test_takes_no_number_again_under_which_something_may_have_run(self) -> None:
        """The status of the first pass is lost, and somebody deletes its Job."""
        story = Story(make_job())
        assert story.look(parts=(1,)) == [Delete("Service", "demo-a1", "part-1")]
        assert story.status.attempts[0].outcome == "Disrupted"
        actions = story.look(parts=(1,), seconds=10)
        assert [action.name for action in actions if isinstance(action, Create)] == [
            "demo-a2",
            "demo-a2",
            "demo-a2-11111111",
        ]
        assert Delete("ConfigMap", "demo-a1-11111111", "part-1") in actions

    def test_after_a_lost_status_adopts_the_gang(self) -> None:
        story = Story(make_job())
        assert story.look(make_gang().started(), make_pod().running(), parts=(1,)) == []
        assert (story.status.attempt, story.status.phase) == (1, "Running")

    @pytest.mark.parametrize(
        ("spoil", "told"),
        [
            (lambda job: job.spec("compute.image", None), "trainerImage"),
            (lambda job: job.spec("checkpoint.uri", None), "expected s3://"),
            (lambda job: job.spec("checkpoint.uri", "runs"), "'runs': expected s3://"),
            (
                lambda job: job.spec("data.prompts", None).spec("data.promptsFile", "p.txt"),
                "'p.txt' is relative",
            ),
            (lambda job: job.spec("algorithm.epochs", 0), "spec.algorithm.epochs"),
            (lambda job: job.spec("sampling.width", 15), "14 x 14"),
        ],
    )
    def test_of_a_job_that_cannot_run_says_why(
        self, spoil: Callable[[JobBuilder], JobBuilder], told: str
    ) -> None:
        story = Story(spoil(make_job()))
        assert story.look() == []
        assert story.reason(ConditionType.FAILED) == Reason.SPEC_INVALID
        assert told in story.message(ConditionType.FAILED)
        assert story.finished
        assert story.status.phase == "Failed"

    def test_takes_the_operators_image_where_the_job_has_none(self) -> None:
        pods = configuration.Pods(image="default:1")
        job = make_job().spec("compute.image", None)
        assert kinds(Story(job, replace(SETTINGS, pods=pods)).look()) == START


class TestStarting:
    @pytest.mark.parametrize(
        ("pod", "reason"),
        [
            (make_pod(), Reason.PODS_STARTING),
            (make_pod().waiting("ContainerCreating"), Reason.PODS_STARTING),
            (make_pod().waiting("ImagePullBackOff", "no such image"), Reason.IMAGE_PULL_FAILED),
            (make_pod().waiting("ErrImagePull", "denied"), Reason.IMAGE_PULL_FAILED),
            (
                make_pod().waiting("CreateContainerConfigError", "secret not found"),
                Reason.CONTAINER_NOT_STARTED,
            ),
            (make_pod().unschedulable("0/2 nodes are available"), Reason.UNSCHEDULABLE),
        ],
    )
    def test_the_status_names_what_it_waits_for(self, pod: PodBuilder, reason: Reason) -> None:
        story = started()
        assert story.look(make_gang().started(), pod, parts=(1,)) == []
        assert (story.status.phase, story.running) == ("Starting", reason)

    def test_one_pod_that_cannot_start_is_found_among_many(self) -> None:
        story = started(make_job().nodes(3))
        pods = [make_pod(rank=0).running(), make_pod(rank=1).running(), make_pod(rank=2)]
        story.look(
            make_gang(nodes=3).started(), *pods[:2], pods[2].unschedulable("no GPU"), parts=(1,)
        )
        assert story.message(ConditionType.RUNNING) == "pod demo-a1-2-x: no GPU"
        assert (story.status.replicas.desired, story.status.replicas.running) == (3, 2)

    def test_a_queue_holds_it_back(self) -> None:
        story = started(make_job().spec("runPolicy.activeDeadlineSeconds", 5))
        assert story.look(make_gang().queued(), parts=(1,), seconds=1000) == []
        assert (story.status.phase, story.running) == ("Pending", Reason.QUEUED)

    def test_a_queue_takes_it_back_and_admits_it_again(self) -> None:
        """Neither spends an attempt, nor does the time in the queue count towards the deadline;
        the time before does."""
        story = started(make_job().spec("runPolicy.activeDeadlineSeconds", 50))
        story.look(make_gang().started(10), make_pod().running(), parts=(1,), seconds=20)
        story.look(make_gang().queued(), parts=(1,), seconds=30)
        assert story.status.attempt_started_at is None
        story.look(make_gang().started(900), make_pod().running(), parts=(1,), seconds=910)
        assert (story.status.phase, story.status.attempt) == ("Running", 1)
        assert (story.status.active_seconds, story.again_in) == (20, 20)

    def test_all_pods_run(self) -> None:
        story = started(make_job().nodes(2))
        story.look(
            make_gang(nodes=2).started(3),
            make_pod(rank=0).running(),
            make_pod(rank=1).running(),
            parts=(1,),
            seconds=5,
        )
        assert (story.status.phase, story.running) == ("Running", Reason.PODS_RUNNING)
        assert story.status.start_time == story.status.attempt_started_at == at(3)
        assert story.again_in is None


class TestSuccess:
    def test_the_job_succeeds_and_keeps_its_pods_for_their_logs(self) -> None:
        story = started()
        actions = story.look(
            make_gang().started().complete(100), make_pod().succeeded(), parts=(1,), seconds=101
        )
        assert kinds(actions) == [("Delete", "Service"), ("Delete", "ConfigMap")]
        assert (story.status.phase, story.finished) == ("Succeeded", True)
        assert story.reason(ConditionType.FINISHED) == Reason.SUCCEEDED
        assert story.status.completion_time == at(100)
        assert story.status.active_seconds == 100
        assert story.look(make_gang().started().complete(100), seconds=200) == []

    def test_counts_more_than_a_suspension_of_the_same_moment(self) -> None:
        story = started()
        story.job.suspended()
        story.look(make_gang().started().complete(), seconds=100)
        assert story.status.phase == "Succeeded"

    def test_the_last_progress_is_complete(self) -> None:
        story = started()
        reading = Reading(progress(epoch=1))
        story.look(make_gang().started(), make_pod().running(), parts=(1,), reading=reading)
        assert story.status.progress_text == "1/2"
        story.look(make_gang().started().complete())
        assert story.status.progress_text == "2/2"
        assert story.status.checkpoint is not None
        assert story.status.checkpoint.epoch == 2


class TestFailure:
    def test_restarts_after_a_pause(self) -> None:
        story = started()
        story.look(failed_gang(), make_pod().failed(1, "boom"), seconds=100)
        assert (story.status.phase, story.running) == ("Restarting", Reason.RESTARTING)
        assert story.status.restarts.failures == 1
        assert "boom" in story.message(ConditionType.RUNNING)
        assert story.again_in is not None
        assert 7 < story.again_in <= 12
        assert story.look(failed_gang(), make_pod().failed(1), seconds=104) == []
        actions = story.look(failed_gang(), make_pod().failed(1), seconds=112)
        assert kinds(actions) == START
        assert {action.name for action in actions} == {"demo-a2", "demo-a2-11111111"}

    def test_waits_for_pods_that_still_stop(self) -> None:
        story = started()
        gang = make_gang().started().failing(100)
        stopping = make_pod(rank=1).running().deleting(220)
        story.look(gang, make_pod().failed(1), stopping, seconds=100)
        assert story.running == Reason.STOPPING
        assert story.look(gang, make_pod().failed(1), stopping, seconds=300) == []
        assert story.again_in == SETTINGS.timing.recheck_stopping

    def test_does_not_wait_for_ever_for_a_lost_node(self) -> None:
        story = started()
        gang = make_gang().started().failing(100)
        lost = make_pod().running().disrupted("DeletionByTaintManager").deleting(220)
        story.look(gang, lost, seconds=100)
        late = 220 + SETTINGS.timing.lost_node
        assert story.look(gang, lost, seconds=late - 1) == []
        assert kinds(story.look(gang, lost, seconds=late)) == START

    def test_does_not_wait_for_a_job_controller_that_waits_for_a_lost_node(self) -> None:
        """The pod was the only one: nothing has failed, and nobody can say that it is dead."""
        story = started()
        gang = make_gang().started()
        lost = make_pod().running().disrupted("DeletionByTaintManager").deleting(220)
        late = 220 + SETTINGS.timing.lost_node
        story.look(gang, lost, parts=(1,), seconds=late - 1)
        assert (story.status.attempt, story.again_in) == (1, 1)
        actions = story.look(gang, lost, parts=(1,), seconds=late)
        assert Delete("Job", "demo-a1", "gang-1") in actions
        assert story.status.attempts[0].outcome == "Disrupted"
        failure = story.status.attempts[0].failure
        assert failure is not None
        assert (failure.node, failure.reason) == ("node-1", "DeletionByTaintManager")
        actions = story.look(gang.deleting(), lost, seconds=late + 10)
        assert {action.name for action in actions} == {"demo-a2", "demo-a2-11111111"}

    def test_a_queue_that_takes_pods_back_may_take_its_time(self) -> None:
        story = started()
        story.look(make_gang().queued(), make_pod().running().deleting(20), seconds=10_000)
        assert story.status.attempts[0].outcome == "Active"

    def test_ends_the_job_when_restarts_are_used_up(self) -> None:
        story = started(make_job().max_restarts(0))
        story.look(failed_gang(), make_pod().failed(1, "boom"), seconds=100)
        assert story.reason(ConditionType.FAILED) == Reason.RESTARTS_EXHAUSTED
        assert "restarts used: 0 of 0" in story.message(ConditionType.FAILED)
        assert story.finished

    def test_of_a_permanent_kind_ends_it_at_once(self) -> None:
        story = started()
        story.look(failed_gang(), make_pod().failed(83, "not finite"), seconds=100)
        assert story.reason(ConditionType.FAILED) == Reason.PERMANENT_FAILURE
        assert story.message(ConditionType.FAILED).endswith("exit code 83 (Error): not finite")
        assert story.status.restarts.failures == 0

    def test_is_not_the_end_before_the_last_pod_has_stopped(self) -> None:
        story = started()
        gang, pod = make_gang().started().failing(100), make_pod().failed(83)
        story.look(gang, pod, make_pod(rank=1).running().deleting(220), seconds=100)
        assert (story.status.phase, story.finished) == ("Failed", False)
        assert story.reason(ConditionType.FINISHED) == Reason.STOPPING
        story.look(failed_gang(), pod, seconds=110)
        assert story.finished

    def test_disruptions_are_free(self) -> None:
        story = started(make_job().max_restarts(0))
        pod = make_pod().disrupted().failed(85)
        for attempt in range(1, 5):
            seconds = 1000 * attempt
            gang = failed_gang(attempt, seconds)
            story.look(gang, make_pod(attempt).disrupted().failed(85), seconds=seconds)
            assert story.status.restarts.disruptions == attempt
            assert kinds(story.look(gang, pod, seconds=seconds + 400))[-3:] == START
        assert story.status.restarts.failures == 0
        assert story.status.attempt == 5

    def test_only_the_last_ten_attempts_are_remembered(self) -> None:
        story = started()
        for attempt in range(1, 14):
            gang = failed_gang(attempt, 1000 * attempt)
            pod = make_pod(attempt).disrupted().failed(85)
            story.look(gang, pod, seconds=1000 * attempt)
            story.look(gang, pod, seconds=1000 * attempt + 400)
        numbers = [attempt.number for attempt in story.status.attempts]
        assert numbers == list(range(5, 15))

    def test_a_gang_that_vanished_is_a_disruption(self) -> None:
        story = started()
        story.look(seconds=5)
        assert story.status.restarts.disruptions == 1
        assert story.status.attempts[0].outcome == "Disrupted"

    def test_old_gangs_go_the_last_but_one_stays_for_its_logs(self) -> None:
        story = started()
        pod = make_pod().disrupted().failed(85)
        story.look(failed_gang(1), pod, seconds=100)
        story.look(failed_gang(1), pod, seconds=400)
        story.look(failed_gang(1), failed_gang(2, 500), seconds=500)
        actions = story.look(failed_gang(1), failed_gang(2, 500), seconds=900)
        assert actions[0] == Delete("Job", "demo-a1", "gang-1")
        assert kinds(actions[1:]) == START

    def test_what_this_operator_cannot_read_runs_on_and_is_not_started_again(self) -> None:
        """Stored by another version, whose schema was different."""
        story = started()
        story.job.spec("algorithm.epochs", 0)
        gang = make_gang().started()
        assert story.look(gang, make_pod().running(), parts=(1,), seconds=50) == []
        story.look(failed_gang(), make_pod().failed(1), seconds=100)
        assert story.reason(ConditionType.FAILED) == Reason.SPEC_INVALID
        assert "spec.algorithm.epochs" in story.message(ConditionType.FAILED)


class TestSuspension:
    def test_stops_the_gang_and_says_so_when_it_is_done(self) -> None:
        story = started()
        story.job.suspended()
        gang, pod = make_gang().started(), make_pod().running()
        actions = story.look(gang, pod, parts=(1,), seconds=50)
        assert Delete("Job", "demo-a1", "gang-1") in actions
        assert (story.phase, story.running) == ("Suspending", Reason.SUSPENDING)
        assert story.look(gang.deleting(), pod.deleting(170), seconds=55) == []
        assert story.phase == "Suspending"
        story.look(seconds=60)
        assert story.phase == "Suspended"
        assert story.status.attempts[0].outcome == "Suspended"
        assert story.again_in is None

    def test_resumes_as_a_new_attempt_without_spending_one(self) -> None:
        story = started()
        story.job.suspended()
        story.look(make_gang().started(), seconds=50)
        story.look(seconds=60)
        story.job.suspended(False)
        actions = story.look(seconds=5000)
        assert kinds(actions) == START
        assert story.status.attempt == 2
        assert (story.status.restarts.failures, story.status.restarts.disruptions) == (0, 0)
        assert story.status.active_seconds == 50

    def test_resumed_before_the_pods_have_stopped_waits_for_them(self) -> None:
        story = started()
        story.job.suspended()
        gang, pod = make_gang().started(), make_pod().running()
        story.look(gang, pod, seconds=50)
        story.job.suspended(False)
        assert story.look(gang.deleting(), pod.deleting(170), seconds=55) == []
        assert story.running == Reason.STOPPING
        assert kinds(story.look(seconds=60)) == START

    def test_between_two_attempts(self) -> None:
        story = started()
        story.look(failed_gang(), make_pod().failed(1), seconds=100)
        story.job.suspended()
        assert story.look(failed_gang(), make_pod().failed(1), seconds=500) == []
        assert story.status.phase == "Suspended"

    def test_does_not_wait_for_ever_for_a_lost_node(self) -> None:
        story = started()
        story.job.suspended()
        gang, lost = make_gang().started().deleting(), make_pod().running().deleting(170)
        late = 170 + SETTINGS.timing.lost_node
        story.look(gang, lost, seconds=late - 1)
        assert (story.phase, story.running) == ("Suspending", Reason.SUSPENDING)
        story.look(gang, lost, seconds=late)
        assert (story.phase, story.running) == ("Suspended", Reason.SUSPENDED_BY_USER)


class TestTime:
    def test_the_deadline_counts_active_time_over_attempts(self) -> None:
        job = make_job().spec("runPolicy.activeDeadlineSeconds", 150)
        story = started(job)
        story.look(make_gang().started(), parts=(1,), seconds=1)
        assert story.again_in == 149
        story.look(failed_gang(1, 100), make_pod().failed(1), seconds=100)
        story.look(failed_gang(1, 100), seconds=200)
        story.look(failed_gang(1, 100), make_gang(2).started(200), parts=(2,), seconds=210)
        assert story.again_in == 40
        actions = story.look(make_gang(2).started(200), parts=(2,), seconds=250)
        assert Delete("Job", "demo-a2", "gang-2") in actions
        assert story.reason(ConditionType.FAILED) == Reason.DEADLINE_EXCEEDED
        assert story.status.active_seconds == 150

    def test_a_finished_job_lives_for_its_ttl(self) -> None:
        story = started(make_job().spec("runPolicy.ttlSecondsAfterFinished", 60))
        gang = make_gang().started().complete(100)
        story.look(gang, seconds=100)
        assert story.again_in == 60
        assert story.look(gang, seconds=159) == []
        assert story.look(gang, seconds=160) == [Delete("TempFlowGRPOJob", "demo", UID)]

    def test_a_ttl_that_is_set_later_counts_from_the_end(self) -> None:
        story = started()
        gang = make_gang().started().complete(100)
        story.look(gang, seconds=100)
        story.job.spec("runPolicy.ttlSecondsAfterFinished", 0)
        assert kinds(story.look(gang, seconds=101)) == [("Delete", "TempFlowGRPOJob")]


class TestObstacles:
    def test_what_could_not_be_started_has_not_started(self) -> None:
        story = Story(make_job())
        story.look(obstacle=Obstacle(Reason.NAME_TAKEN, "Job team/demo-a1 belongs to ..."))
        assert (story.status.attempt, story.running) == (0, Reason.NAME_TAKEN)
        assert story.status.phase == "Pending"
        assert kinds(story.look(seconds=5)) == START

    def test_parts_that_somebody_deleted_are_made_again(self) -> None:
        story = started()
        actions = story.look(make_gang().started(), make_pod().running(), seconds=5)
        assert kinds(actions) == [START[0], START[2]]

    def test_a_changed_operator_does_not_end_what_runs(self) -> None:
        """The image that a running job took from the operator's default is the default no more."""
        pods = configuration.Pods(image="default:1")
        story = Story(make_job().spec("compute.image", None), replace(SETTINGS, pods=pods))
        story.look()
        story.settings = SETTINGS
        story.look(make_gang().started(), make_pod().running(), parts=(1,), seconds=5)
        assert story.status.phase == "Running"


class TestProgress:
    def look(self, story: Story, reading: Reading | None) -> None:
        story.look(make_gang().started(), make_pod().running(), parts=(1,), reading=reading)

    def test_stands_in_the_status(self) -> None:
        story = started()
        self.look(story, Reading(progress(epoch=1, checkpoint=1)))
        assert story.status.progress_text == "1/2"
        assert story.status.checkpoint is not None
        assert story.status.checkpoint.uri == "s3://bucket/1"
        assert is_true(story.status.conditions, ConditionType.CHECKPOINTED)

    def test_a_problem_stands_beside_the_last_that_was_known(self) -> None:
        story = started()
        self.look(story, Reading(progress(epoch=1)))
        self.look(story, Reading(progress(epoch=1), "no answer in time"))
        assert story.status.progress_text == "1/2"
        assert story.message(ConditionType.RUNNING).endswith("cannot be read: no answer in time")
        assert story.status.phase == "Running"

    def test_the_checkpoint_outlives_the_attempt(self) -> None:
        story = started()
        self.look(story, Reading(progress(checkpoint=1)))
        self.look(story, Reading(progress(checkpoint=None)))
        assert story.status.checkpoint is not None
        assert story.status.checkpoint.epoch == 1


def test_a_foreign_gang_of_the_name_is_not_ours() -> None:
    """Left over by a job of the same name: it blocks creation and is touched by nobody."""
    story = Story(make_job())
    actions = story.look(make_gang(owned_by="somebody-else").started())
    assert kinds(actions) == START
    assert all(isinstance(action, Create) for action in actions)


def test_a_status_that_nobody_can_read_is_written_anew() -> None:
    story = Story(make_job().with_status({"attempt": "many"}))
    story.look(make_gang(3).started(), make_pod(3).running(), parts=(3,))
    assert (story.status.attempt, story.status.phase) == (3, "Running")
