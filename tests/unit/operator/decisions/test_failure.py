"""Which class a failure is of, and where it began."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow_api.errors import PERMANENT, ExitCode
from tempflow_api.status import Failure
from tempflow_operator.decisions.failure import (
    Ending,
    FailureClass,
    classify,
    last_line,
    pause,
    sentence,
)
from tempflow_operator.settings import Timing
from tests.builders import GangBuilder, PodBuilder, make_gang, make_pod, seen

PERMANENT_CLASS, RETRIABLE, PREFLIGHT, DISRUPTION = FailureClass


def ending(gang: GangBuilder, *pods: PodBuilder) -> Ending:
    snapshot = seen(gang, *pods)
    return classify(snapshot.gangs[0], snapshot.pods)


class TestExitCodes:
    @pytest.mark.parametrize("code", sorted(PERMANENT))
    def test_permanent(self, code: ExitCode) -> None:
        kind, cause = ending(make_gang().failing(), make_pod().running().failed(code, "why"))
        assert kind is PERMANENT_CLASS
        assert (cause.pod, cause.node, cause.container) == ("demo-a1-0-x", "node-1", "trainer")
        assert (cause.exit_code, cause.message) == (code, "why")

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            (ExitCode.BUG, RETRIABLE),
            (ExitCode.ADDRESS_IN_USE, RETRIABLE),
            (ExitCode.FENCED, RETRIABLE),
            (ExitCode.RANK_DIED, RETRIABLE),
            (ExitCode.UNCOMMITTED, RETRIABLE),
            (137, RETRIABLE),
            (139, RETRIABLE),
            (ExitCode.PREEMPTED, DISRUPTION),
            (143, DISRUPTION),
        ],
    )
    def test_others(self, code: int, expected: FailureClass) -> None:
        assert ending(make_gang().failing(), make_pod().failed(code)).failure_class is expected

    def test_every_code_is_decided(self) -> None:
        for code in ExitCode:
            ending(make_gang().failing(), make_pod().failed(code))

    def test_out_of_memory(self) -> None:
        kind, cause = ending(make_gang().failing(), make_pod().failed(137, reason="OOMKilled"))
        assert (kind, cause.exit_code, cause.reason) == (RETRIABLE, 137, "OOMKilled")


class TestDisruptions:
    @pytest.mark.parametrize(
        "reason", ["PreemptionByScheduler", "EvictionByEvictionAPI", "DeletionByTaintManager"]
    )
    def test_the_cluster_took_the_pod(self, reason: str) -> None:
        pod = make_pod().running().disrupted(reason).failed(137)
        kind, cause = ending(make_gang().failing(), pod)
        assert (kind, cause.reason, cause.message) == (DISRUPTION, reason, "drained")

    def test_before_the_container_has_ended(self) -> None:
        """A pod on a lost node never tells how its container ended."""
        pod = make_pod().running().disrupted("DeletionByTaintManager").deleting()
        kind, cause = ending(make_gang().failing(), pod)
        assert (kind, cause.pod, cause.exit_code) == (DISRUPTION, "demo-a1-0-x", None)

    @pytest.mark.parametrize("reason", ["Evicted", "UnexpectedAdmissionError", "OutOfcpu"])
    def test_the_kubelet_turned_the_pod_away(self, reason: str) -> None:
        kind, cause = ending(make_gang().failing(), make_pod().turned_away(reason, "no room"))
        assert (kind, cause.reason, cause.message) == (DISRUPTION, reason, "no room")

    def test_a_user_deleted_a_pod(self) -> None:
        """Whether it ended in time or was killed."""
        for code in (85, 143, 137):
            pod = make_pod().failed(code).deleting()
            assert ending(make_gang().failing(), pod).failure_class is DISRUPTION

    def test_a_user_deleted_the_gang(self) -> None:
        kind, cause = ending(make_gang().deleting())
        assert (kind, cause.reason) == (DISRUPTION, "JobDeleted")

    def test_a_permanent_code_is_permanent_all_the_same(self) -> None:
        pod = make_pod().disrupted().failed(ExitCode.DIVERGED)
        assert ending(make_gang().failing(), pod).failure_class is PERMANENT_CLASS


class TestFirstCause:
    """The Job controller stops the other ranks, and they die of the first one's death."""

    def test_the_ranks_that_were_stopped_are_not_it(self) -> None:
        kind, cause = ending(
            make_gang().failing(),
            make_pod(rank=0).failed(85, seconds=10).deleting(),
            make_pod(rank=1).failed(1, "boom", seconds=12),
            make_pod(rank=2).failed(143, seconds=11).deleting(),
        )
        assert (kind, cause.pod) == (RETRIABLE, "demo-a1-1-x")

    def test_the_strongest_evidence(self) -> None:
        kind, cause = ending(
            make_gang().failing(),
            make_pod(rank=0).failed(1, "connection reset", seconds=10),
            make_pod(rank=1).failed(137, reason="OOMKilled", seconds=11),
        )
        assert (kind, cause.pod, cause.reason) == (RETRIABLE, "demo-a1-1-x", "OOMKilled")

    def test_the_earliest_of_equal_evidence(self) -> None:
        _, cause = ending(
            make_gang().failing(),
            make_pod(rank=0).failed(1, seconds=11),
            make_pod(rank=1).failed(1, seconds=10),
        )
        assert cause.pod == "demo-a1-1-x"

    def test_a_running_pod_is_no_suspect(self) -> None:
        _, cause = ending(
            make_gang().failing(), make_pod(rank=0).running(), make_pod(rank=1).failed(1)
        )
        assert cause.pod == "demo-a1-1-x"

    @given(order=st.permutations(range(4)))
    def test_does_not_depend_on_the_order_of_the_list(self, order: list[int]) -> None:
        pods = [
            make_pod(rank=0).failed(85).deleting(),
            make_pod(rank=1).failed(1, seconds=9),
            make_pod(rank=2).failed(1, seconds=9),
            make_pod(rank=3).running(),
        ]
        found = ending(make_gang().failing(), *(pods[index] for index in order))
        assert found.cause.pod == "demo-a1-1-x"


MESSAGES = {
    "Container trainer for pod team/demo-a1-0-x failed with exit code 83 matching FailJob rule at "
    "index 0": (PERMANENT_CLASS, 83),
    "Pod team/demo-a1-0-x has condition DisruptionTarget matching FailJob rule at index 1": (
        DISRUPTION,
        None,
    ),
    "Container trainer for pod team/demo-a1-0-x failed with exit code 85 matching FailJob rule at "
    "index 2": (DISRUPTION, 85),
}


class TestWhenThePodsAreGone:
    @pytest.mark.parametrize("message", MESSAGES)
    def test_the_job_tells(self, message: str) -> None:
        kind, cause = ending(make_gang().failed(reason="PodFailurePolicy", message=message))
        assert (kind, cause.exit_code) == MESSAGES[message]
        assert (cause.pod, cause.message) == ("demo-a1-0-x", message)

    def test_nothing_is_told(self) -> None:
        kind, cause = ending(make_gang().failed(message="Job has reached the backoff limit"))
        assert (kind, cause.reason, cause.pod) == (RETRIABLE, "BackoffLimitExceeded", "")

    def test_the_job_outweighs_the_ranks_that_were_stopped(self) -> None:
        message = next(iter(MESSAGES))
        gang = make_gang().failed(reason="PodFailurePolicy", message=message)
        kind, cause = ending(gang, make_pod(rank=1).failed(85).deleting())
        assert (kind, cause.exit_code) == (PERMANENT_CLASS, 83)


class TestWords:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("", ""), ("\n \n", ""), ("one", "one"), ("a\nb \n\n", "b"), ("x" * 5000, "x" * 1024)],
    )
    def test_the_last_line(self, text: str, expected: str) -> None:
        assert last_line(text) == expected

    def test_the_whole_cause(self) -> None:
        cause = Failure(pod="p", node="n", container="c", exit_code=137, reason="OOMKilled")
        assert sentence(cause) == "pod p, node n, container c: exit code 137 (OOMKilled)"
        assert sentence(Failure(reason="JobDeleted")) == "(JobDeleted)"
        assert sentence(Failure(pod="p", exit_code=1, message="m")) == "pod p: exit code 1: m"


class TestPauses:
    timing = Timing(restart_delay=10, restart_delay_limit=300, disruption_delay=2)

    @pytest.mark.parametrize(
        ("count", "steady"), [(1, 10), (2, 20), (3, 40), (5, 160), (6, 300), (1000, 300)]
    )
    def test_double_up_to_the_limit(self, count: int, steady: float) -> None:
        wait = pause(RETRIABLE, count, self.timing, salt="x")
        assert 0.8 * steady <= wait <= 1.2 * steady

    def test_are_short_after_a_disruption(self) -> None:
        assert pause(DISRUPTION, 1, self.timing, salt="x") <= 2.4

    def test_spread_over_jobs_and_repeat_for_one(self) -> None:
        waits = [pause(RETRIABLE, 1, self.timing, salt=str(n)) for n in range(200)]
        assert len(set(waits)) == 200
        assert min(waits) < 8.5
        assert max(waits) > 11.5
        assert waits[0] == pause(RETRIABLE, 1, self.timing, salt="0")

    def test_none_when_none_is_wanted(self) -> None:
        assert pause(RETRIABLE, 3, replace(self.timing, restart_delay=0), salt="x") == 0
