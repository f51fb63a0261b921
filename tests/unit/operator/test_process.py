"""What surrounds the passes: settings, probes, metrics, logs, watches, stopping."""

import asyncio
import json
import logging
import re
import sys

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tempflow_api import naming
from tempflow_api.status import Attempt
from tempflow_api.termination import LastWords
from tempflow_operator import watches
from tempflow_operator.cluster import CONFIG_MAPS, TRAINING_JOBS, ApiError, _answer, _newest
from tempflow_operator.decisions.ledger import Ledger
from tempflow_operator.lastwords import Heard
from tempflow_operator.logs import JsonFormatter
from tempflow_operator.main import first_of
from tempflow_operator.metrics import Metrics
from tempflow_operator.probes import ProbeServer, WatchProof
from tempflow_operator.progress import Target
from tempflow_operator.reconcile import rank_zero
from tempflow_operator.settings import (
    ENVIRONMENT,
    Lease,
    SettingInvalid,
    Settings,
    from_environment,
)
from tests.builders import PodBuilder, make_job, make_pod, seen


class TestSettings:
    def test_an_empty_environment_gives_the_defaults(self) -> None:
        assert from_environment({}) == Settings()
        assert from_environment(dict.fromkeys(ENVIRONMENT, "")) == Settings()

    def test_all_of_them(self) -> None:
        given = from_environment(
            {
                "TEMPFLOW_WATCH_NAMESPACES": "a, b,,c ",
                "TEMPFLOW_TRAINER_IMAGE": "trainer:1",
                "TEMPFLOW_RESTART_DELAY_SECONDS": "2.5",
                "TEMPFLOW_LOST_NODE_SECONDS": "30",
                "TEMPFLOW_UNREACHABLE_SECONDS": "5",
                "TEMPFLOW_PROGRESS_SECONDS": "20",
                "TEMPFLOW_WORKERS": "3",
                "TEMPFLOW_RESYNC_SECONDS": "60",
                "TEMPFLOW_LEADER_ELECTION": "false",
                "TEMPFLOW_LEASE_NAME": "lease",
                "TEMPFLOW_LEASE_SECONDS": "30",
                "TEMPFLOW_HTTP_PORT": "9000",
                "TEMPFLOW_LOG_FORMAT": "json",
                "TEMPFLOW_LOG_LEVEL": "DEBUG",
                "POD_NAMESPACE": "system",
                "POD_NAME": "operator-0",
            }
        )
        assert given.namespaces == ("a", "b", "c")
        assert given.pods.image == "trainer:1"
        assert (given.timing.restart_delay, given.timing.lost_node) == (2.5, 30)
        assert given.pods.unreachable_toleration == 5
        assert (given.progress.interval, given.queue.workers, given.queue.resync) == (20, 3, 60)
        assert (given.lease.enabled, given.lease.name) == (False, "lease")
        assert (given.lease.namespace, given.lease.identity) == ("system", "operator-0")
        assert (given.health.port, given.logs.json, given.logs.level) == (9000, True, "DEBUG")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("TEMPFLOW_WORKERS", "many"),
            ("TEMPFLOW_WORKERS", "0"),
            ("TEMPFLOW_LEASE_SECONDS", "1"),
            ("TEMPFLOW_RESYNC_SECONDS", "1e9"),
            ("TEMPFLOW_PROGRESS_SECONDS", "nan"),
            ("TEMPFLOW_LOG_FORMAT", "xml"),
            ("TEMPFLOW_LEADER_ELECTION", "yes"),
        ],
    )
    def test_nonsense_is_named(self, key: str, value: str) -> None:
        with pytest.raises(SettingInvalid, match=re.escape(f"{key}={value!r}")):
            from_environment({key: value})

    @pytest.mark.parametrize("seconds", ["3", "15", "60"])
    def test_a_leader_gives_up_before_its_lease_is_free(self, seconds: str) -> None:
        lease = from_environment({"TEMPFLOW_LEASE_SECONDS": seconds}).lease
        assert lease.retry < lease.renew_deadline < lease.duration
        assert from_environment({}).lease == Lease()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TestWatchProof:
    def proof(self, *, by_namespace: bool = False) -> tuple[WatchProof, Clock]:
        clock = Clock()
        return WatchProof(clock, by_namespace=by_namespace), clock

    def test_a_quiet_cluster_owes_nothing(self) -> None:
        proof, clock = self.proof()
        proof.saw("pods", "team", "10")
        proof.expect("team", {"pods": 10, "jobs": 0})
        clock.now = 1000
        assert proof.longest_debt() == 0

    def test_a_dead_stream_owes_what_a_list_has_shown(self) -> None:
        proof, clock = self.proof()
        proof.saw("pods", "team", "10")
        proof.expect("team", {"pods": 11})
        clock.now = 50
        proof.expect("team", {"pods": 12})
        clock.now = 130
        assert proof.longest_debt() == 130

    def test_a_late_event_pays(self) -> None:
        proof, clock = self.proof()
        proof.expect("team", {"pods": 11})
        clock.now = 100
        proof.saw("pods", "team", "11")
        assert proof.longest_debt() == 0

    def test_another_kind_does_not(self) -> None:
        proof, clock = self.proof()
        proof.expect("team", {"pods": 11})
        proof.saw("jobs", "team", "500")
        clock.now = 7
        assert proof.longest_debt() == 7

    def test_another_namespace_does_where_one_stream_covers_both(self) -> None:
        for by_namespace, debt in ((False, 0), (True, 7)):
            proof, clock = self.proof(by_namespace=by_namespace)
            proof.expect("team", {"pods": 11})
            proof.saw("pods", "other", "500")
            clock.now = 7
            assert proof.longest_debt() == debt

    def test_a_version_that_is_no_number_is_ignored(self) -> None:
        proof, _ = self.proof()
        proof.saw("pods", "team", "opaque")
        assert proof.longest_debt() == 0


async def get(port: int, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        return response.status, await response.text()


class TestProbes:
    def test_health_follows_the_check(self) -> None:
        problem = ""

        async def story() -> None:
            nonlocal problem
            server = ProbeServer(0, alive=lambda: problem, metrics=Metrics(), host="127.0.0.1")
            port = await server.start()
            assert await get(port, "/healthz") == (200, "ok")
            assert await get(port, "/readyz") == (200, "ok")
            problem = "a watch is 200 s behind a list"
            assert await get(port, "/healthz") == (503, problem)
            assert await get(port, "/readyz") == (200, "ok")
            await server.stop()

        asyncio.run(story())

    def test_metrics_are_prometheus(self) -> None:
        async def story() -> str:
            metrics = Metrics()
            metrics.watch_queue(lambda: 3, lambda: 1.5)
            metrics.set_jobs({"Running": 2})
            metrics.set_jobs({"Failed": 1})
            server = ProbeServer(0, alive=lambda: "", metrics=metrics, host="127.0.0.1")
            port = await server.start()
            _, text = await get(port, "/metrics")
            await server.stop()
            return text

        families = {f.name: f for f in text_string_to_metric_families(asyncio.run(story()))}
        assert families["tempflow_queue_depth"].samples[0].value == 3
        assert [s.labels for s in families["tempflow_jobs"].samples] == [{"phase": "Failed"}]
        assert all(name.startswith("tempflow_") for name in families)
        labels = {key for f in families.values() for s in f.samples for key in s.labels}
        assert not labels & {"job", "name", "namespace", "uid", "pod"}


class TestLogs:
    def test_one_object_a_line(self) -> None:
        try:
            raise RuntimeError("boom")
        except RuntimeError:
            record = logging.LogRecord(
                "x", logging.WARNING, "f", 1, "two\nlines of %s", ("ä",), sys.exc_info()
            )
        line = JsonFormatter().format(record)
        assert "\n" not in line
        read = json.loads(line)
        assert (read["level"], read["logger"]) == ("warning", "x")
        assert read["message"] == "two\nlines of ä"
        assert "RuntimeError: boom" in read["exception"]


class TestWatches:
    def test_kopf_filters_on_the_server_and_writes_nothing(self) -> None:
        settings = watches.settings()
        selectors = settings.watching.label_selectors
        assert [selectors[kind] for kind in selectors] == [naming.LABEL_JOB_UID] * 2
        assert settings.scanning.disabled
        assert settings.peering.standalone
        assert not settings.posting.enabled

    def test_no_handler_stores_anything(self) -> None:
        """Handlers of changes, timers and daemons would annotate every job."""
        watching = watches.Watches((), lambda *_: None, lambda *_: None)
        registry = watching._registry(asyncio.new_event_loop())
        assert len(registry._watching.get_all_handlers()) == 3
        assert not registry._changing.get_all_handlers()
        assert not registry._spawning.get_all_handlers()
        assert not registry._indexing.get_all_handlers()


class TestStopping:
    def test_the_first_to_end_ends_all(self) -> None:
        ended = []

        async def lasting() -> None:
            try:
                await asyncio.sleep(100)
            finally:
                await asyncio.sleep(0)
                ended.append("lasting")

        asyncio.run(first_of(asyncio.sleep(0.01), lasting()))
        assert ended == ["lasting"]

    def test_an_error_is_passed_on(self) -> None:
        async def failing() -> None:
            raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            asyncio.run(first_of(failing(), asyncio.sleep(100)))

    def test_being_cancelled_ends_all(self) -> None:
        ended = []

        async def lasting() -> None:
            try:
                await asyncio.sleep(100)
            finally:
                ended.append("lasting")

        async def story() -> None:
            both = asyncio.create_task(first_of(lasting(), lasting()))
            await asyncio.sleep(0.01)
            both.cancel()
            with pytest.raises(asyncio.CancelledError):
                await both

        asyncio.run(story())
        assert ended == ["lasting", "lasting"]


class TestCluster:
    """The calls themselves are the cluster tests' business."""

    def test_addresses(self) -> None:
        assert TRAINING_JOBS.path("team", "demo", "status") == (
            "/apis/tempflow.dev/v1alpha1/namespaces/team/tempflowgrpojobs/demo/status"
        )
        assert TRAINING_JOBS.path(None) == "/apis/tempflow.dev/v1alpha1/tempflowgrpojobs"
        assert CONFIG_MAPS.path("team") == "/api/v1/namespaces/team/configmaps"

    def test_errors_say_what_was_asked_and_answered(self) -> None:
        body = json.dumps({"reason": "Forbidden", "message": "exceeded quota"}).encode()
        with pytest.raises(ApiError, match="create /x: 403 Forbidden: exceeded quota") as caught:
            _answer("create /x", 403, body)
        assert caught.value.refused

    @pytest.mark.parametrize(("code", "refused"), [(422, True), (409, False), (500, False)])
    def test_only_some_are_the_requests_fault(self, code: int, refused: bool) -> None:
        with pytest.raises(ApiError) as caught:
            _answer("x", code, b"<html>")
        assert caught.value.refused == refused

    def test_the_newest_version(self) -> None:
        versions = [{"metadata": {"resourceVersion": v}} for v in ("9", "10", "opaque")]
        assert _newest(versions) == 10
        assert _newest([]) == 0


class TestWhomToAsk:
    def target(self, *pods: PodBuilder, attempt: int = 2) -> Target | None:
        record = Attempt(number=attempt, outcome="Active")
        return rank_zero(
            make_job().typed(), seen(*pods), Ledger(attempt=attempt, attempts=(record,))
        )

    def test_the_running_pod_of_rank_zero(self) -> None:
        pods = [make_pod(2, 1).running(ip="10.0.0.9"), make_pod(2, 0).running(ip="10.0.0.7")]
        assert self.target(*pods) == Target("pod-2-0", "10.0.0.7", 2, "team/demo-11111111")

    @pytest.mark.parametrize(
        "pod",
        [
            make_pod(2, 0),
            make_pod(1, 0).running(),
            make_pod(2, 1).running(),
            make_pod(2, 0).running(ip=""),
            make_pod(2, 0).running().deleting(),
            make_pod(2, 0).succeeded(),
        ],
    )
    def test_nobody_else(self, pod: PodBuilder) -> None:
        assert self.target(pod) is None

    def test_nobody_between_attempts(self) -> None:
        assert (
            rank_zero(make_job().typed(), seen(make_pod(1, 0).running()), Ledger(attempt=1)) is None
        )


class TestHeard:
    def words(self, attempt: int, incarnation: int = 1) -> LastWords:
        return LastWords(
            run_id="team/demo",
            attempt=attempt,
            incarnation=incarnation,
            checkpoint_epoch=attempt,
        )

    def test_the_newest_attempts_words_are_kept(self) -> None:
        heard = Heard()
        for attempt in (1, 3, 2):
            heard.note("team", "uid", self.words(attempt))
        assert heard.of("team", "uid") == self.words(3)
        for incarnation in (3, 2):
            heard.note("team", "uid", self.words(3, incarnation))
        assert heard.of("team", "uid") == self.words(3, 3)

    def test_a_pod_of_another_namespace_or_job_is_not_believed(self) -> None:
        heard = Heard()
        heard.note("evil", "uid", self.words(1))
        heard.note("team", "other", self.words(1))
        assert heard.of("team", "uid") is None

    def test_it_does_not_grow_for_ever(self) -> None:
        heard = Heard()
        for number in range(10_001):
            heard.note("team", str(number), self.words(1))
        assert heard.of("team", "0") is None
        assert heard.of("team", "10000") is not None


class TestKnown:
    def metadata(self, generation: int = 1, **more: str) -> dict[str, object]:
        return {"uid": "job-1", "generation": generation, **more}

    def test_a_status_that_was_written_concerns_nobody(self) -> None:
        known = watches.Known()
        assert known.concerned_by("ADDED", self.metadata())
        assert not known.concerned_by("MODIFIED", self.metadata())

    def test_everything_else_does(self) -> None:
        known = watches.Known()
        known.concerned_by("ADDED", self.metadata())
        assert known.concerned_by("MODIFIED", self.metadata(2))
        assert known.concerned_by("MODIFIED", self.metadata(2, deletionTimestamp="now"))
        assert known.concerned_by(None, self.metadata(2, deletionTimestamp="now"))
        assert known.concerned_by("DELETED", self.metadata(2, deletionTimestamp="now"))
