"""From the API server's JSON to what decisions see."""

import pytest

from tempflow_operator.decisions import instants
from tempflow_operator.decisions.adoption import controller_uid, owned_by
from tempflow_operator.decisions.observed import (
    Key,
    Why,
    may_have_policy,
    snapshot,
    training_job,
)
from tests.builders import T0, UID, at, make_gang, make_job, make_part, make_pod, owner, seen


class TestTrainingJob:
    def test_a_valid_one(self) -> None:
        job = training_job(make_job().nodes(3).suspended().build())
        assert (job.name, job.namespace, job.uid, job.generation) == ("demo", "team", UID, 1)
        assert job.spec is not None
        assert job.spec.compute.nodes == 3
        assert (job.suspend, job.deleting, job.problems) == (True, False, ())

    def test_an_unknown_field_is_a_problem_with_its_path(self) -> None:
        job = training_job(make_job().spec("compute.colour", "red").build())
        assert job.spec is None
        assert job.problems[0].startswith("spec.compute.colour: ")
        assert not job.suspend

    def test_a_broken_rule_is_a_problem(self) -> None:
        job = training_job(make_job().spec("sampling.width", 15).build())
        (problem,) = job.problems
        assert problem.startswith("spec.sampling.width: is 14 for the digits family")

    def test_a_status_of_a_newer_operator_is_understood(self) -> None:
        job = training_job(make_job().with_status({"attempt": 3, "mood": "good"}).build())
        assert job.status.attempt == 3

    def test_a_spoilt_status_is_none(self) -> None:
        assert training_job(make_job().with_status({"attempt": -1}).build()).status.attempt == 0

    def test_a_policy_is_looked_for_where_one_was_ever_asked_for(self) -> None:
        never = make_job().spec("compute.network", {"policy": False}).build()
        assert not may_have_policy(never)
        assert may_have_policy(make_job().spec("compute.network", {"policy": True}).build())
        stored_before_there_was_one = make_job().spec("compute.network", {}).build()
        assert may_have_policy(stored_before_there_was_one)
        never["metadata"]["generation"] = 2
        assert may_have_policy(never)

    def test_a_key_in_words(self) -> None:
        assert str(Key("team", "demo")) == "team/demo"


class TestGang:
    def test_fresh(self) -> None:
        (gang,) = seen(make_gang(3, nodes=2)).gangs
        assert (gang.name, gang.attempt, gang.nodes) == ("demo-a3", 3, 2)
        assert (gang.start_time, gang.failing, gang.terminal, gang.queued) == (
            None, None, False, False,
        )  # fmt: skip

    def test_failing_is_not_yet_failed(self) -> None:
        (gang,) = seen(make_gang().failing(5, message="m")).gangs
        assert gang.failing == Why(reason="BackoffLimitExceeded", message="m", time=T0 + 5)
        assert not gang.terminal
        assert seen(make_gang().failing().failed()).gangs[0].terminal

    def test_complete(self) -> None:
        (gang,) = seen(make_gang().started(1).complete(9)).gangs
        assert (gang.start_time, gang.completed_at, gang.terminal) == (T0 + 1, T0 + 9, True)

    def test_a_false_condition_is_none(self) -> None:
        assert seen(make_gang().condition("Failed", "x", status="False")).gangs[0].failing is None


class TestPod:
    def test_pending(self) -> None:
        (pod,) = seen(make_pod(2, 5)).pods
        assert (pod.attempt, pod.rank, pod.phase, pod.live, pod.deleting) == (
            2, 5, "Pending", True, False,
        )  # fmt: skip

    def test_running(self) -> None:
        (pod,) = seen(make_pod().running(ip="fd00::1", node="n")).pods
        assert (pod.ip, pod.node, pod.live, pod.ended) == ("fd00::1", "n", True, None)

    def test_ended(self) -> None:
        (pod,) = seen(make_pod().failed(137, "m", reason="OOMKilled", seconds=3)).pods
        assert pod.ended is not None
        assert (pod.ended.exit_code, pod.ended.reason, pod.ended.time) == (137, "OOMKilled", T0 + 3)
        assert not pod.live

    def test_being_deleted(self) -> None:
        assert seen(make_pod().running().deleting(30)).pods[0].stop_by == T0 + 30

    def test_other_containers_do_not_matter(self) -> None:
        raw = make_pod().failed(1).build()
        raw["status"]["containerStatuses"].insert(0, {"name": "sidecar", "state": {}})
        (pod,) = snapshot(UID, pods=[raw]).pods
        assert pod.ended is not None

    def test_nothing_but_a_name(self) -> None:
        (pod,) = snapshot(UID, pods=[{"metadata": {"name": "x"}}]).pods
        assert (pod.attempt, pod.rank, pod.phase) == (0, None, "Pending")

    @pytest.mark.parametrize("conditions", [None, []])
    def test_no_conditions(self, conditions: object) -> None:
        raw = make_pod().build()
        raw["status"]["conditions"] = conditions
        assert snapshot(UID, pods=[raw]).pods[0].disruption is None


class TestWhatMayLive:
    def test_an_ended_gang_holds_nothing(self) -> None:
        assert not seen(make_gang().failed(), make_pod().failed(1)).anything_live

    def test_a_gang_without_pods_may_still_start_them(self) -> None:
        assert seen(make_gang()).anything_live
        assert seen(make_gang()).may_start_pods
        assert not seen(make_gang().failing()).may_start_pods
        assert not seen(make_gang().deleting()).may_start_pods

    def test_a_pod_outlives_its_gang(self) -> None:
        assert seen(make_pod().running()).anything_live


class TestAdoption:
    def test_only_the_controller_counts(self) -> None:
        references = [{"uid": "other"}, *owner(UID, "TempFlowGRPOJob")]
        assert owned_by({"ownerReferences": references}, UID)
        assert controller_uid({"ownerReferences": [{"uid": UID}]}) is None
        assert not owned_by({}, UID)
        assert not owned_by({"ownerReferences": None}, UID)

    def test_what_a_namesake_left_is_not_seen(self) -> None:
        assert seen(make_gang(owned_by="old")).gangs == ()
        part = make_part()
        part["metadata"]["ownerReferences"] = owner("old", "TempFlowGRPOJob")
        assert snapshot(UID, parts={"Service": [part]}).parts == ()


class TestInstants:
    @pytest.mark.parametrize("text", ["2026-01-31T12:00:00Z", "1999-12-31T23:59:59Z"])
    def test_round_trip(self, text: str) -> None:
        assert instants.timestamp(instants.seconds(text)) == text

    def test_fractions(self) -> None:
        assert instants.seconds("2026-01-31T12:00:00.25Z") == T0 + 0.25
        assert instants.timestamp(T0 + 0.99) == at(0)
        assert instants.micro_timestamp(T0 + 0.25) == "2026-01-31T12:00:00.250000Z"
