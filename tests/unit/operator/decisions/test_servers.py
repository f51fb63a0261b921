"""Rewards that the operator serves: their servers live as long as an attempt may run, and what
keeps them from serving is told."""

import pytest

from tempflow_api.conditions import ConditionType, Reason
from tempflow_operator.decisions.plan import Create, Delete
from tempflow_operator.decisions.status import Reading
from tests.builders import (
    JobBuilder,
    PodBuilder,
    ServersBuilder,
    at,
    make_gang,
    make_job,
    make_pod,
    make_server,
    make_servers,
)
from tests.unit.operator.decisions.stories import SETTINGS, Story, failed_gang, kinds

START = [
    ("Create", "Service"),
    ("Create", "Service"),
    ("Create", "Deployment"),
    ("Create", "Job"),
    ("Create", "ConfigMap"),
]
GONE = [("Delete", "Deployment"), ("Delete", "Service"), ("Delete", "Service")]


def served() -> JobBuilder:
    """A job whose only reward is served by the operator."""
    return make_job().spec("rewards", [{"name": "digit", "placement": "service"}])


def started(job: JobBuilder | None = None) -> Story:
    story = Story(job or served())
    assert kinds(story.look()) == START
    return story


def ranks_run(*servers: PodBuilder | ServersBuilder) -> Story:
    """A story whose only rank runs, beside these objects."""
    story = started()
    story.look(make_gang().started(), make_pod().running(), *servers, parts=(1,), seconds=10)
    return story


class TestLife:
    def test_they_are_there_before_the_ranks_and_stay_while_these_run(self) -> None:
        story = started()
        things = (make_gang().started(), make_pod().running(), make_servers(), make_server())
        assert story.look(*things, parts=(1,), seconds=10) == []

    def test_somebody_deletes_them(self) -> None:
        story = started()
        actions = story.look(make_gang().started(), make_pod().running(), parts=(1,), seconds=10)
        assert kinds(actions) == [("Create", "Service"), ("Create", "Deployment")]

    def test_they_go_with_the_end_which_waits_for_them(self) -> None:
        story = started()
        gang, pod = make_gang().started().complete(100), make_pod().succeeded()
        things = (gang, pod, make_servers(), make_server().ready())
        actions = story.look(*things, parts=(1,), seconds=101)
        assert Delete("Deployment", "demo-a1-r0", "servers-1") in actions
        assert (story.phase, story.finished) == ("Succeeded", False)
        stopping = (make_servers().deleting(), make_server().running().deleting(130))
        assert story.look(gang, pod, *stopping, seconds=105) == []
        assert (story.finished, story.again_in) == (False, SETTINGS.timing.recheck_stopping)
        story.look(gang, pod, seconds=120)
        assert story.finished

    def test_a_suspended_job_holds_none(self) -> None:
        story = started()
        story.job.suspended()
        things = (make_gang().started(), make_pod().running(), make_servers(), make_server())
        actions = story.look(*things, parts=(1,), seconds=50)
        assert set(GONE) < set(kinds(actions))
        story.look(make_servers().deleting(), make_server().running().deleting(90), seconds=60)
        assert story.phase == "Suspending"
        story.look(seconds=70)
        assert story.phase == "Suspended"

    def test_a_cancelled_job_holds_none(self) -> None:
        story = started()
        story.job.spec("runPolicy.cancel", True)
        things = (make_gang().started(), make_pod().running(), make_servers(), make_server())
        assert set(GONE) < set(kinds(story.look(*things, parts=(1,), seconds=50)))

    def test_the_next_attempt_has_its_own_when_the_old_ones_are_gone(self) -> None:
        story = started()
        gang, pod = failed_gang(), make_pod().failed(90)
        actions = story.look(gang, pod, make_servers(), make_server().ready(), seconds=100)
        assert Delete("Deployment", "demo-a1-r0", "servers-1") in actions
        stopping = (make_servers().deleting(), make_server().running().deleting(130))
        assert story.look(gang, pod, *stopping, seconds=120) == []
        actions = story.look(gang, pod, seconds=125)
        assert kinds(actions) == START
        assert "demo-a2-r0" in {action.name for action in actions}

    def test_a_server_on_a_lost_node_is_not_waited_for_for_ever(self) -> None:
        story = started()
        gang, pod = failed_gang(), make_pod().failed(90)
        lost = (make_servers().deleting(), make_server().running().deleting(130))
        story.look(gang, pod, *lost, seconds=100)
        late = 130 + SETTINGS.timing.lost_node
        assert story.look(gang, pod, *lost, seconds=late - 1) == []
        assert kinds(story.look(gang, pod, *lost, seconds=late)) == START

    def test_a_pass_that_was_cut_off_behind_them_is_continued(self) -> None:
        """The Deployment stands and nothing else; status knows of no attempt."""
        actions = Story(served()).look(make_servers(), make_server(), seconds=5)
        assert kinds(actions) == [("Create", "Service"), ("Create", "Job"), ("Create", "ConfigMap")]

    def test_those_of_a_stranger_are_not_ours(self) -> None:
        theirs = make_servers()
        theirs.build()["metadata"]["ownerReferences"][0]["uid"] = "somebody-else"
        actions = Story(served()).look(theirs)
        assert all(isinstance(action, Create) for action in actions)
        assert kinds(actions) == START  # which the API server refuses: the name is taken


class TestQueue:
    def test_nothing_is_held_before_the_queue_admits_the_ranks(self) -> None:
        story = Story(served().spec("runPolicy.queue", "research"))
        assert ("Create", "Deployment") not in kinds(story.look())
        service = make_servers()
        waits = story.look(make_gang().queued(), parts=(1,), seconds=10)
        assert kinds(waits) == [("Create", "Service")]
        actions = story.look(make_gang().started(20), parts=(1,), seconds=20)
        assert ("Create", "Deployment") in kinds(actions)
        taken_back = story.look(make_gang().queued(), service, parts=(1,), seconds=30)
        assert taken_back == [Delete("Deployment", "demo-a1-r0", "servers-1")]

    def test_admitted_again_while_the_old_ones_stop(self) -> None:
        """Nothing tells when a Deployment is gone, so it is looked for."""
        story = Story(served().spec("runPolicy.queue", "research"))
        story.look()
        stopping = make_servers().deleting()
        again = story.look(make_gang().started(40), stopping, parts=(1,), seconds=40)
        assert ("Create", "Deployment") not in kinds(again)
        assert story.again_in == SETTINGS.timing.recheck_stopping
        again = story.look(make_gang().started(40), parts=(1,), seconds=45)
        assert ("Create", "Deployment") in kinds(again)


class TestStatus:
    def test_all_is_well(self) -> None:
        story = ranks_run(make_servers(), make_server().ready())
        assert (story.phase, story.running) == ("Running", Reason.PODS_RUNNING)
        assert story.message(ConditionType.RUNNING) == "1 of 1 pods run"
        assert story.status.attempts[0].running_time == at(10)
        assert (story.status.replicas.desired, story.status.replicas.running) == (1, 1)

    def test_a_server_that_loads_its_model(self) -> None:
        story = ranks_run(make_servers(), make_server().running())
        told = story.message(ConditionType.RUNNING)
        assert told == "1 of 1 pods run; no server is ready yet for digit"
        assert story.status.attempts[0].running_time is None

    @pytest.mark.parametrize(
        ("pod", "reason", "told"),
        [
            (
                make_server().waiting("ImagePullBackOff", "no such image"),
                Reason.IMAGE_PULL_FAILED,
                "reward digit: pod demo-a1-r0-x: no such image",
            ),
            (
                make_server().waiting("CreateContainerConfigError", "secret not found"),
                Reason.CONTAINER_NOT_STARTED,
                "reward digit: pod demo-a1-r0-x: secret not found",
            ),
            (
                make_server().unschedulable("0/2 nodes are available"),
                Reason.UNSCHEDULABLE,
                "reward digit: pod demo-a1-r0-x: 0/2 nodes are available",
            ),
            (
                make_server().running().crashing(81, "INFO loads\nerror: no reward 'digit'"),
                Reason.REWARD_NOT_SERVED,
                "reward digit: pod demo-a1-r0-x: exit code 81 (Error): error: no reward 'digit'",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) and value in set(Reason) else "",
    )
    def test_a_server_that_cannot_serve(self, pod: PodBuilder, reason: Reason, told: str) -> None:
        story = ranks_run(make_servers(), pod)
        assert (story.phase, story.running) == ("Starting", reason)
        assert story.message(ConditionType.RUNNING) == told

    def test_pods_that_cannot_be_created(self) -> None:
        story = ranks_run(make_servers().refused("exceeded quota: gpus"))
        assert (story.phase, story.running) == ("Starting", Reason.REWARD_NOT_SERVED)
        assert story.message(ConditionType.RUNNING) == "reward digit: exceeded quota: gpus"

    def test_one_of_two_is_enough(self) -> None:
        other = make_server().unschedulable("no GPU")
        other.build()["metadata"]["name"] = "demo-a1-r0-y"
        story = ranks_run(make_servers(), make_server().ready(), other)
        assert story.running == Reason.PODS_RUNNING

    def test_what_keeps_a_rank_comes_first(self) -> None:
        story = started()
        rank, server = make_pod().unschedulable("no GPU"), make_server().unschedulable("no memory")
        story.look(make_gang().started(), rank, make_servers(), server, parts=(1,), seconds=10)
        assert story.message(ConditionType.RUNNING) == "pod demo-a1-0-x: no GPU"

    def test_it_counts_for_the_deadline_before_running(self) -> None:
        story = started(served().spec("runPolicy.preRunningDeadlineSeconds", 60))
        things = (make_gang().started(), make_pod().running(), make_servers())
        pod = make_server().unschedulable("no GPU")
        story.look(*things, pod, parts=(1,), seconds=10)
        assert story.again_in == 50
        story.look(*things, pod, parts=(1,), seconds=60)
        assert story.reason(ConditionType.FAILED) == Reason.PRE_RUNNING_DEADLINE_EXCEEDED
        assert story.message(ConditionType.FAILED).endswith(
            "reward digit: pod demo-a1-r0-x: no GPU"
        )

    def test_loading_for_too_long_does_so_too(self) -> None:
        story = started(served().spec("runPolicy.preRunningDeadlineSeconds", 60))
        things = (make_gang().started(), make_pod().running(), make_servers())
        story.look(*things, make_server().running(), parts=(1,), seconds=60)
        assert story.message(ConditionType.FAILED).endswith("no server is ready yet for digit")

    def test_a_server_is_no_rank(self) -> None:
        """Its end is nobody's failure, and it is not asked for progress."""
        story = started()
        crashed = make_server().failed(1)
        story.look(make_gang().started(), crashed, make_servers(), parts=(1,), reading=Reading())
        assert story.status.attempts[0].outcome == "Active"
        assert (story.status.replicas.failed, story.status.replicas.running) == (0, 0)
