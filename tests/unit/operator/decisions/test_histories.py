"""What holds in every history: random failures, crashes of the operator, users and time.

``World`` moves objects the way the Job controller and the kubelet do, in steps that hypothesis
chooses; the decisions under test are the real ones.
"""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tempflow_api.conditions import ConditionType, Reason, find, is_true
from tempflow_api.errors import PERMANENT
from tempflow_api.status import JobStatus
from tempflow_operator import settings as configuration
from tempflow_operator.decisions import plan
from tempflow_operator.decisions.observed import Snapshot, snapshot, training_job
from tempflow_operator.decisions.plan import Action, Create, Delete
from tempflow_operator.decisions.reading import Reading
from tempflow_operator.decisions.status import next_status, stored_form
from tempflow_operator.reconcile import decide
from tests.builders import T0, UID, Raw, at, make_gang, make_job, make_pod, make_server
from tests.unit.operator.decisions.stories import progress

SETTINGS = configuration.Settings()
NODES = 2
GRACE = 120
LIMITS = {
    "activeDeadlineSeconds": 3000,
    "preRunningDeadlineSeconds": 900,
    "stallTimeoutSeconds": 600,
    "ttlSecondsAfterFinished": 5000,
    "maxPreflightRestarts": 1,
}


_OF_TIME = (Reason.DEADLINE_EXCEEDED, Reason.PRE_RUNNING_DEADLINE_EXCEEDED)
"""Ends that no exit code explains."""


class World:
    """The cluster's side."""

    def __init__(self) -> None:
        self.now = 0.0
        served = [{"name": "digit", "placement": "service"}]
        job = make_job().nodes(NODES).max_restarts(2).spec("rewards", served)
        for limit, seconds in LIMITS.items():
            job.spec(f"runPolicy.{limit}", seconds)
        self.job = job.build()
        self.expired = False
        self.gangs: dict[str, Raw] = {}
        self.pods: dict[str, Raw] = {}
        self.deployments: dict[str, Raw] = {}
        self.servers: dict[str, Raw] = {}
        """Pods of the Deployments, by the Deployment's name: one each."""
        self.parts: dict[tuple[str, str], Raw] = {}
        self.used: set[int] = set()
        """Numbers under which a trainer may have run: its pods need Job and ConfigMap."""
        self.lost: set[str] = set()
        """Pods on a node that is gone: nothing ever changes about them."""

    def seen(self) -> Snapshot:
        services = [part for (kind, _), part in self.parts.items() if kind == "Service"]
        maps = [part for (kind, _), part in self.parts.items() if kind == "ConfigMap"]
        return snapshot(
            UID,
            jobs=self.gangs.values(),
            pods=[*self.pods.values(), *self.servers.values()],
            deployments=self.deployments.values(),
            parts={"Service": services, "ConfigMap": maps},
        )

    def execute(self, action: Action) -> None:
        if isinstance(action, Create):
            manifest: Raw = {**action.manifest}
            manifest["metadata"] = {**manifest["metadata"], "uid": f"uid-{action.name}"}
            if action.kind == "Job":
                known = self.job.get("status", {}).get("attempt", 0)
                number = int(manifest["metadata"]["labels"]["tempflow.dev/attempt"])
                assert number > known, "no attempt that status knows is started again"
                assert action.name not in self.gangs
                manifest["status"] = {}
                assert number not in self.used, "a number under which something ran is used up"
                self.gangs[action.name] = manifest
            elif action.kind == "Deployment":
                assert action.name not in self.deployments
                self.deployments[action.name] = manifest
            else:
                self.parts[action.kind, action.name] = manifest
            if action.kind == "ConfigMap":
                self.used.add(int(manifest["metadata"]["labels"]["tempflow.dev/attempt"]))
        elif action.kind == "TempFlowGRPOJob":
            self.expired = True
        elif action.kind == "Job":
            self.gangs[action.name]["metadata"]["deletionTimestamp"] = at(0)
        elif action.kind == "Deployment":
            self.deployments[action.name]["metadata"]["deletionTimestamp"] = at(0)
        else:
            del self.parts[action.kind, action.name]

    def pods_of(self, gang: Raw) -> list[Raw]:
        attempt = gang["metadata"]["labels"]["tempflow.dev/attempt"]
        pods = self.pods.values()
        return [p for p in pods if p["metadata"]["labels"]["tempflow.dev/attempt"] == attempt]

    def controllers(self) -> None:
        """One round of the Job controller and of the garbage collector."""
        for name, gang in list(self.gangs.items()):
            self._job_controller(name, gang)
        for name, deployment in list(self.deployments.items()):
            self._deployment_controller(name, deployment)

    def _deployment_controller(self, name: str, deployment: Raw) -> None:
        attempt = int(deployment["metadata"]["labels"]["tempflow.dev/attempt"])
        if "deletionTimestamp" not in deployment["metadata"]:
            self.servers.setdefault(name, make_server(attempt).build())
        elif name in self.servers:
            self._stop([self.servers[name]])
        else:
            del self.deployments[name]

    def _job_controller(self, name: str, gang: Raw) -> None:
        attempt = int(gang["metadata"]["labels"]["tempflow.dev/attempt"])
        pods, status = self.pods_of(gang), gang["status"]
        types = {condition["type"] for condition in status.get("conditions", [])}
        if "deletionTimestamp" in gang["metadata"]:
            self._stop(pods)
            if not pods:
                del self.gangs[name]
        elif types & {"Complete", "Failed"}:
            return
        elif "FailureTarget" in types or any(p["status"]["phase"] == "Failed" for p in pods):
            builder = make_gang().with_raw(gang)
            if "FailureTarget" not in types:
                builder.failing(self.now)
            self._stop([p for p in pods if p["status"]["phase"] in ("Pending", "Running")])
            if all(p["status"]["phase"] in ("Succeeded", "Failed") for p in self.pods_of(gang)):
                builder.failed(self.now)
        elif pods and all(p["status"]["phase"] == "Succeeded" for p in pods):
            make_gang().with_raw(gang).complete(self.now)
        elif not pods:
            make_gang().with_raw(gang).started(self.now)
            for rank in range(NODES):
                pod = make_pod(attempt, rank).build()
                self.pods[pod["metadata"]["name"]] = pod

    def _stop(self, pods: list[Raw]) -> None:
        for pod in pods:
            pod["metadata"].setdefault("deletionTimestamp", at(self.now + GRACE))

    def kubelets(self) -> None:
        """Pods start; those that were asked to stop have stopped, and go."""
        for name, pod in list(self.pods.items()):
            if name in self.lost:
                continue
            if "deletionTimestamp" in pod["metadata"]:
                del self.pods[name]
            elif pod["status"]["phase"] == "Pending":
                make_pod().with_raw(pod).running()
        for name, pod in list(self.servers.items()):
            if "deletionTimestamp" in pod["metadata"]:
                del self.servers[name]
            elif pod["status"]["phase"] == "Pending":
                make_pod().with_raw(pod).ready()

    def kill_overdue(self) -> None:
        """No kubelet lets a pod live on after its grace period."""
        for name, pod in list(self.pods.items()):
            stop_by = pod["metadata"].get("deletionTimestamp", at(self.now + 1))
            if name not in self.lost and stop_by <= at(self.now):
                del self.pods[name]
        for name, pod in list(self.servers.items()):
            if pod["metadata"].get("deletionTimestamp", at(self.now + 1)) <= at(self.now):
                del self.servers[name]

    def live_attempts(self) -> set[int]:
        """Attempts that may still run: on lost nodes nobody knows, the store's fence holds."""
        pods = [pod for name, pod in self.pods.items() if name not in self.lost]
        living = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
        starting = [
            gang
            for gang in self.gangs.values()
            if not gang["status"].get("conditions") and "deletionTimestamp" not in gang["metadata"]
        ]
        labels = [thing["metadata"]["labels"] for thing in (*living, *starting)]
        return {int(label["tempflow.dev/attempt"]) for label in labels}


class Histories(RuleBasedStateMachine):
    """A job's life."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.status = JobStatus()
        self.attempt = 0
        self.finished = False
        self.ended_by: dict[int, str] = {}
        self.started: str | None = None
        self.epoch = 0

    def one_pass(self, *, actions: int | None = None, write: bool = True) -> list[Action]:
        """A pass of the operator that may die after some of its calls."""
        world = self.world
        job, seen, now = training_job(world.job), world.seen(), T0 + world.now
        reading = self.reading(job.status.attempt)
        decision = decide(job, seen, now, SETTINGS, reading)
        for action in decision.actions[:actions]:
            world.execute(action)
        if write and actions is None:
            accounts = decision.intended
            released = plan.released(accounts, seen, now, SETTINGS.timing)
            status = next_status(
                job,
                seen,
                accounts,
                reading=reading,
                words=None,
                obstacle=None,
                released=released,
                now=now,
            )
            world.job["status"], self.status = stored_form(status), status
        return decision.actions

    def reading(self, attempt: int) -> Reading | None:
        """What rank 0 says, where it runs and can be reached."""
        running = any(
            make_pod(attempt, 0).build()["metadata"]["name"] == name
            and pod["status"]["phase"] == "Running"
            for name, pod in self.world.pods.items()
            if name not in self.world.lost
        )
        if not running:
            return None
        return Reading(progress(epoch=self.epoch, attempt=attempt))

    @rule()
    def training_moves_on(self) -> None:
        self.epoch += 1

    @rule()
    def operator(self) -> None:
        self.one_pass()
        conditions = self.status.conditions
        assert {condition.type for condition in conditions} == {
            kind.value for kind in ConditionType
        }
        generation = self.world.job["metadata"]["generation"]
        assert all(condition.observed_generation == generation for condition in conditions)

    @rule()
    def operator_twice(self) -> None:
        self.one_pass()
        # What proves that a number is used goes when status knows the number.
        left = self.one_pass()
        assert all(isinstance(a, Delete) and a.kind == "ConfigMap" for a in left)
        assert self.one_pass() == [], "a further pass has nothing to do"
        settled = dict(self.world.job["status"])
        assert self.one_pass() == []
        assert self.world.job["status"] == settled, "and nothing to write"

    @rule(calls=st.integers(0, 6))
    def operator_dies(self, calls: int) -> None:
        self.one_pass(actions=calls)

    @rule()
    def operator_dies_before_the_status(self) -> None:
        self.one_pass(write=False)

    @rule()
    def controllers(self) -> None:
        self.world.controllers()

    @rule()
    def kubelets(self) -> None:
        self.world.kubelets()

    @rule(seconds=st.sampled_from([1, 10, 60, 400]))
    def time_passes(self, seconds: int) -> None:
        self.world.now += seconds
        self.world.kill_overdue()

    def a_pod(self, draw: Any, phase: str) -> Raw | None:
        pods = [
            pod
            for name, pod in sorted(self.world.pods.items())
            if pod["status"]["phase"] == phase and name not in self.world.lost
        ]
        return pods[draw % len(pods)] if pods else None

    @rule(draw=st.integers(0, 7), code=st.sampled_from([1, 83, 90, 91, 137, 85]))
    def pod_fails(self, draw: int, code: int) -> None:
        pod = self.a_pod(draw, "Running")
        if pod is not None:
            make_pod().with_raw(pod).failed(code, "last words", seconds=self.world.now)

    @rule(draw=st.integers(0, 7))
    def pod_is_evicted(self, draw: int) -> None:
        pod = self.a_pod(draw, "Running")
        if pod is not None:
            make_pod().with_raw(pod).disrupted().failed(85, seconds=self.world.now)

    @rule(draw=st.integers(0, 7))
    def node_is_lost(self, draw: int) -> None:
        pod = self.a_pod(draw, "Running")
        if pod is not None:
            make_pod().with_raw(pod).disrupted("DeletionByTaintManager").deleting(
                self.world.now + GRACE
            )
            self.world.lost.add(pod["metadata"]["name"])

    @rule()
    def node_comes_back(self) -> None:
        self.world.lost.clear()
        self.world.kubelets()  # the first thing a kubelet does is to end what is overdue

    @rule()
    def all_pods_succeed(self) -> None:
        running = [pod for pod in self.world.pods.values() if pod["status"]["phase"] == "Running"]
        if len(running) == NODES and not self.world.lost:
            for pod in running:
                make_pod().with_raw(pod).succeeded()

    @rule(suspend=st.booleans())
    def user_suspends_or_resumes(self, suspend: bool) -> None:
        if self.world.job["spec"]["runPolicy"]["suspend"] != suspend:
            self.world.job["spec"]["runPolicy"]["suspend"] = suspend
            self.world.job["metadata"]["generation"] += 1

    @rule()
    def user_cancels(self) -> None:
        if not self.world.job["spec"]["runPolicy"].get("cancel"):
            self.world.job["spec"]["runPolicy"]["cancel"] = True
            self.world.job["metadata"]["generation"] += 1

    @precondition(lambda self: self.world.gangs)
    @rule()
    def somebody_deletes_the_gang(self) -> None:
        gang = self.world.gangs[max(self.world.gangs)]
        gang["metadata"]["deletionTimestamp"] = at(0)

    @invariant()
    def at_most_one_attempt_lives(self) -> None:
        assert len(self.world.live_attempts()) <= 1

    @invariant()
    def servers_are_of_one_attempt_and_of_none_at_the_end(self) -> None:
        deployments = self.world.deployments.values()
        lasting = [one for one in deployments if "deletionTimestamp" not in one["metadata"]]
        attempts = {
            thing["metadata"]["labels"]["tempflow.dev/attempt"]
            for thing in (*lasting, *self.world.servers.values())
        }
        assert len(attempts) <= 1
        if is_true(self.status.conditions, ConditionType.FINISHED):
            assert not attempts

    @invariant()
    def attempts_only_grow(self) -> None:
        assert self.status.attempt >= self.attempt
        self.attempt = self.status.attempt
        numbers = [attempt.number for attempt in self.status.attempts]
        assert numbers == sorted(set(numbers))
        assert len(numbers) <= 10

    @invariant()
    def times_follow_one_another(self) -> None:
        moments = [
            moment
            for attempt in self.status.attempts
            for moment in (attempt.start_time, attempt.end_time)
            if moment is not None
        ]
        assert moments == sorted(moments)
        for attempt in self.status.attempts:
            if attempt.running_time is not None:
                assert attempt.start_time is not None
                assert attempt.start_time <= attempt.running_time
        assert self.started is None or self.status.start_time == self.started
        self.started = self.status.start_time

    @invariant()
    def no_more_time_is_counted_than_there_was(self) -> None:
        assert 0 <= self.status.active_seconds <= self.world.now

    @invariant()
    def a_suspended_job_holds_nothing(self) -> None:
        current = self.status.observed_generation == self.world.job["metadata"]["generation"]
        if current and is_true(self.status.conditions, ConditionType.SUSPENDED):
            assert not self.world.live_attempts()
            assert self.status.attempt == 0 or self.status.attempts[-1].outcome != "Active"

    @invariant()
    def what_has_expired_was_finished(self) -> None:
        assert self.finished or not self.world.expired

    @invariant()
    def an_end_is_final(self) -> None:
        finished = is_true(self.status.conditions, ConditionType.FINISHED)
        assert finished or not self.finished
        self.finished = finished
        if finished:
            assert not self.world.live_attempts()
            succeeded = is_true(self.status.conditions, ConditionType.SUCCEEDED)
            assert succeeded != is_true(self.status.conditions, ConditionType.FAILED)

    @invariant()
    def endings_are_final_and_counted_by_class(self) -> None:
        for attempt in self.status.attempts:
            if attempt.outcome != "Active":
                known = self.ended_by.setdefault(attempt.number, attempt.outcome)
                assert known == attempt.outcome

        failed = sum(outcome == "Failed" for outcome in self.ended_by.values())
        last = self.status.attempts[-1].outcome if self.status.attempts else ""
        why = find(self.status.conditions, ConditionType.FAILED)
        given_up = why is not None and why.status == "True" and why.reason != Reason.CANCELLED
        assert self.status.restarts.failures == failed - (given_up and last == "Failed")
        assert self.status.restarts.failures <= 2
        unfit = sum(outcome == "Unfit" for outcome in self.ended_by.values())
        assert self.status.restarts.preflights == unfit - (given_up and last == "Unfit")
        assert self.status.restarts.preflights <= 1
        disrupted = sum(outcome == "Disrupted" for outcome in self.ended_by.values())
        assert self.status.restarts.disruptions == disrupted

    @invariant()
    def an_end_has_its_reason(self) -> None:
        failed = find(self.status.conditions, ConditionType.FAILED)
        if failed is None or failed.status != "True":
            return
        if failed.reason == Reason.CANCELLED:
            assert self.world.job["spec"]["runPolicy"]["cancel"]
            return
        cause = self.status.attempts[-1].failure
        assert cause is not None
        own = {reason.value for reason in _OF_TIME} & {cause.reason}
        if cause.exit_code in PERMANENT:
            assert failed.reason == Reason.PERMANENT_FAILURE
        elif own:
            assert failed.reason == cause.reason
        elif self.status.attempts[-1].outcome == "Unfit":
            assert failed.reason == Reason.PREFLIGHT_RESTARTS_EXHAUSTED
        else:
            assert failed.reason == Reason.RESTARTS_EXHAUSTED


def test_histories() -> None:
    Histories.TestCase.settings = settings(
        max_examples=200,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Histories.TestCase("runTest").runTest()
