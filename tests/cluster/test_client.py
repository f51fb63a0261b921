"""The client against a real API server: every method, every refusal, and a server that restarts."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tempflow
from tempflow import (
    Client,
    Conflict,
    Forbidden,
    Invalid,
    JobFailed,
    LogLine,
    NotFound,
    NotInstalled,
    Unauthorized,
    Unreachable,
    WaitTimeout,
)
from tempflow_api import naming
from tests.cluster.apiserver import ApiServer, free_port
from tests.cluster.client_objects import (
    FAILED,
    SUCCEEDED,
    add_node,
    add_pod,
    digits,
    end_pod,
    set_status,
)
from tests.cluster.kubelet import Kubelet, stamp
from tests.cluster.waiting import wait_for

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="session")
def kubelet(api: ApiServer) -> Iterator[Kubelet]:
    server = Kubelet(*api.certificate())
    add_node(api, server)
    yield server
    server.close()


@pytest.fixture
def client(api: ApiServer) -> Iterator[Client]:
    with Client(kubeconfig=str(api.kubeconfig("admin"))) as client:
        yield client


class TestJobs:
    def test_from_submit_to_delete(self, client: Client, api: ApiServer) -> None:
        made = client.submit(digits("life"))
        assert (made.name, made.namespace, made.phase) == ("life", "default", "")
        assert made.spec.algorithm.clip_range == client.get("life").spec.algorithm.clip_range
        assert "life" in [job.name for job in client.list()]
        assert client.suspend("life").spec.run_policy.suspend
        assert not client.resume("life").spec.run_policy.suspend
        assert client.cancel("life").spec.run_policy.cancel
        set_status(api, "life", SUCCEEDED)
        for act in (client.suspend, client.resume, client.cancel):
            with pytest.raises(Conflict, match=r"has ended \(Completed"):
                act("life")
        client.delete("life", timeout_seconds=30)
        with pytest.raises(NotFound, match="job default/life: there is none"):
            client.get("life")

    def test_a_second_one_of_a_name_is_a_conflict(self, client: Client) -> None:
        client.submit(digits("twice"))
        with pytest.raises(Conflict, match="exists already"):
            client.submit(digits("twice"))

    def test_a_dry_run_stores_nothing(self, client: Client, tmp_path: Path) -> None:
        checked = client.submit(with_prompts(tmp_path, "dry", "a three\n"), dry_run=True)
        assert checked.spec.optimizer.beta1 == 0.9  # the server has completed it
        with pytest.raises(NotFound):
            client.get("dry")
        assert config_maps(client, "dry") == []

    def test_what_the_server_refuses_is_invalid(self, client: Client) -> None:
        job = digits("other")
        label = job.job.metadata.model_copy(update={"labels": {"a b": "c"}})
        bad = tempflow.Manifest(job.job.model_copy(update={"metadata": label}), "job")
        with pytest.raises(Invalid, match="a b"):
            client.submit(bad)

    def test_prompts_go_along_and_belong_to_the_job(self, client: Client, tmp_path: Path) -> None:
        made = client.submit(with_prompts(tmp_path, "words", "a three\na four\n"))
        (found,) = config_maps(client, "words")
        assert found["data"] == {"prompts.txt": "a three\na four\n"}
        assert made.spec.data.prompts_config_map == found["metadata"]["name"]
        assert made.spec.data.prompts_file == "prompts.txt"
        (owner,) = found["metadata"]["ownerReferences"]
        assert owner["uid"] == made.uid
        client.delete("words")
        wait_for("prompts gone", lambda: not config_maps(client, "words"), deadline_seconds=20)

    def test_a_refused_job_leaves_no_prompts(self, client: Client, tmp_path: Path) -> None:
        client.submit(digits("taken"))
        with pytest.raises(Conflict):
            client.submit(with_prompts(tmp_path, "taken", "a three\n"))
        assert config_maps(client, "taken") == []


def with_prompts(folder: Path, name: str, text: str) -> tempflow.Manifest:
    (folder / "words.txt").write_text(text)
    source = Path(tempflow.__file__).parent / "presets/digits.yaml"
    lines = source.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "data:")
    end = next(i for i in range(start + 1, len(lines)) if lines[i][:3].strip())
    kept = [*lines[: start + 1], "    promptsFile: words.txt", *lines[end:]]
    (folder / "job.yaml").write_text("\n".join(kept))
    settings = [f"metadata.name={name}", "spec.checkpoint.uri=s3://bucket/runs"]
    return tempflow.read(str(folder / "job.yaml"), settings)


def config_maps(client: Client, job: str) -> list[dict[str, Any]]:
    answer = client.connection.send(
        "GET",
        "/api/v1/namespaces/default/configmaps",
        what="ConfigMaps",
        query={"labelSelector": f"{naming.LABEL_JOB_NAME}={job}"},
    )
    return list(answer["items"])


class TestRefusals:
    def test_nobody_is_forbidden(self, api: ApiServer) -> None:
        with (
            Client(kubeconfig=str(api.kubeconfig("nobody"))) as client,
            pytest.raises(Forbidden, match=r"not allowed: .*cannot list.*tempflow-edit"),
        ):
            client.list()

    def test_a_token_that_is_not_known(self, api: ApiServer) -> None:
        with (
            Client(kubeconfig=str(api.kubeconfig("admin", token="expired"))) as client,
            pytest.raises(Unauthorized, match="expired"),
        ):
            client.get("x")

    def test_no_server(self, api: ApiServer) -> None:
        path = api.kubeconfig("admin", server=f"https://127.0.0.1:{free_port()}")
        with (
            Client(kubeconfig=str(path)) as client,
            pytest.raises(Unreachable, match="refused"),
        ):
            client.list()

    def test_another_authority(self, api: ApiServer) -> None:
        wrong = {"certificate-authority-data": None, "certificate-authority": "/etc/hostname"}
        with pytest.raises(Unreachable):  # noqa: SIM117 - either of the two may find out
            with Client(kubeconfig=str(api.kubeconfig("admin", **wrong))) as client:
                client.list()

    def test_a_kind_that_is_not_installed(self, client: Client, api: ApiServer) -> None:
        with pytest.raises(NotInstalled, match="helm install"):
            client.connection.send(
                "GET", "/apis/tempflow.dev/v9/namespaces/default/things", what="things"
            )

    def test_no_configuration(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        with pytest.raises(Unreachable, match=r"--kubeconfig"):
            Client(kubeconfig=str(tmp_path / "none"))

    def test_a_context_that_is_not_there(self, api: ApiServer) -> None:
        with pytest.raises(Unreachable, match="there is no context 'prod'; there are: admin"):
            Client(kubeconfig=str(api.kubeconfig("admin")), context="prod")


class TestWait:
    def test_for_a_good_end(self, client: Client, api: ApiServer) -> None:
        client.submit(digits("good"))
        threading.Timer(0.5, lambda: set_status(api, "good", SUCCEEDED)).start()
        told: list[str] = []
        job = client.wait("good", timeout_seconds=20, on_change=lambda j: told.append(j.phase))
        assert job.succeeded
        assert told == ["", "Succeeded"]

    def test_for_a_bad_end(self, client: Client, api: ApiServer) -> None:
        client.submit(digits("bad"))
        set_status(api, "bad", FAILED)
        with pytest.raises(JobFailed, match="exit code 81"):
            client.wait("bad", timeout_seconds=20)

    def test_in_vain(self, client: Client) -> None:
        client.submit(digits("slow"))
        with pytest.raises(WaitTimeout, match="not Finished after 1 s"):
            client.wait("slow", timeout_seconds=1)

    def test_for_what_is_deleted(self, client: Client, api: ApiServer) -> None:
        client.submit(digits("gone"))
        threading.Timer(0.5, lambda: client.delete("gone", wait=False)).start()
        with pytest.raises(NotFound, match="was deleted"):
            client.wait("gone", timeout_seconds=20)


class TestWatch:
    def test_a_restart_of_the_server_loses_and_repeats_nothing(
        self, client: Client, api: ApiServer
    ) -> None:
        client.submit(digits("watched"))
        told: list[tuple[str, str, str]] = []

        def listen() -> None:
            for event in client.watch("watched"):
                told.append((event.kind, event.job.phase, event.job.resource_version))
                if event.kind == "deleted":
                    return

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        set_status(api, "watched", {"phase": "Starting"})
        api.restart()
        set_status(api, "watched", {"phase": "Running"})
        time.sleep(1.5)
        api.restart()
        set_status(api, "watched", {"phase": "Succeeded"})
        time.sleep(1.5)
        client.delete("watched", wait=False)
        thread.join(30)
        assert not thread.is_alive()
        versions = [version for *_, version in told]
        assert len(versions) == len(set(versions))
        phases = [phase for _, phase, _ in told]
        expected = iter(phases)
        assert all(phase in expected for phase in ("Running", "Succeeded"))
        assert [kind for kind, *_ in told] == ["added", *["changed"] * (len(told) - 2), "deleted"]

    def test_a_server_that_stays_away_is_an_error(self, api: ApiServer) -> None:
        path = str(api.kubeconfig("admin"))
        with Client(kubeconfig=path, give_up_seconds=1) as client:
            client.submit(digits("lonely"))
            watched = client.watch("lonely")
            assert next(watched).kind == "added"
            api.stop()
            try:
                with pytest.raises(Unreachable):
                    next(watched)
            finally:
                api.start()


def texts(lines: Iterator[LogLine]) -> list[str]:
    return [line.text for line in lines]


class TestLogs:
    def test_ranks_are_merged_by_time(
        self, client: Client, api: ApiServer, kubelet: Kubelet
    ) -> None:
        job = client.submit(digits("merge"))
        for rank in range(3):
            name, log = add_pod(api, kubelet, "merge", job.uid, rank=rank)
            for i in range(5):
                log.write(i * 1_000_000_000 + rank * 7, f"{i} {rank}")
            end_pod(api, name, log)
        lines = list(client.logs("merge"))
        assert [line.text for line in lines] == [f"{i} {r}" for i in range(5) for r in range(3)]
        assert [line.node_rank for line in lines] == [0, 1, 2] * 5
        assert lines[4].time == stamp(1_000_000_007)
        assert texts(client.logs("merge", ranks=[2])) == [f"{i} 2" for i in range(5)]
        assert texts(client.logs("merge", tail=1)) == ["4 0", "4 1", "4 2"]

    def test_attempts(self, client: Client, api: ApiServer, kubelet: Kubelet) -> None:
        job = client.submit(digits("again"))
        for attempt in (1, 2):
            name, log = add_pod(api, kubelet, "again", job.uid, attempt=attempt)
            log.write(attempt, f"attempt {attempt}")
            end_pod(api, name, log)
        assert texts(client.logs("again")) == ["attempt 2"]
        assert texts(client.logs("again", attempt=1)) == ["attempt 1"]
        with pytest.raises(NotFound, match="no attempt before"):
            list(client.logs("again", previous=True))
        set_status(api, "again", {**SUCCEEDED, "attempt": 2})
        assert texts(client.logs("again", previous=True)) == ["attempt 1"]

    def test_of_a_job_without_pods(self, client: Client) -> None:
        client.submit(digits("early"))
        with pytest.raises(NotFound, match="no pod that has started"):
            list(client.logs("early"))

    def test_follow_over_restarts_and_attempts(
        self, client: Client, api: ApiServer, kubelet: Kubelet
    ) -> None:
        job = client.submit(digits("flow"))
        first, log = add_pod(api, kubelet, "flow", job.uid)
        log.write(0, "history")
        got: list[str] = []
        thread = threading.Thread(
            target=lambda: got.extend(texts(client.logs("flow", follow=True))), daemon=True
        )
        thread.start()
        numbers = itertools.count()
        written = ["history"]

        def write(log: object, count: int) -> None:
            for _ in range(count):
                i = next(numbers)
                # Three lines share each time: the place to go on from is inside of them.
                log.write(1_000_000_000 + i // 3, f"line {i}")  # type: ignore[attr-defined]
                written.append(f"line {i}")
                time.sleep(0.01)

        write(log, 100)
        api.stop()
        write(log, 50)
        api.start()
        write(log, 50)
        api.restart()
        write(log, 20)
        end_pod(api, first, log)
        second, log = add_pod(api, kubelet, "flow", job.uid, attempt=2)
        write(log, 10)
        end_pod(api, second, log)
        set_status(api, "flow", {**SUCCEEDED, "attempt": 2})
        thread.join(30)
        assert not thread.is_alive()
        assert got == written

    def test_follow_ends_with_the_named_attempt(
        self, client: Client, api: ApiServer, kubelet: Kubelet
    ) -> None:
        job = client.submit(digits("named"))
        name, log = add_pod(api, kubelet, "named", job.uid)
        log.write(0, "one")
        end_pod(api, name, log)
        set_status(api, "named", {"phase": "Running", "attempt": 2})
        assert texts(client.logs("named", follow=True, attempt=1)) == ["one"]


class TestEvents:
    def test_of_the_job_and_its_pods_only(self, client: Client, api: ApiServer) -> None:
        job = client.submit(digits("told"))
        for i, (kind, name, uid) in enumerate(
            [
                (naming.KIND, "told", job.uid),
                ("Pod", "told-a1-0-abcde", "p"),
                ("Pod", "told-else", "q"),
                (naming.KIND, "told", "of-an-earlier-job"),
            ]
        ):
            api.create(
                {
                    "apiVersion": "events.k8s.io/v1",
                    "kind": "Event",
                    "metadata": {"name": f"told.{i}", "namespace": "default"},
                    "eventTime": f"2026-01-31T12:00:0{9 - i}.000000Z",
                    "reportingController": "tempflow.dev/test",
                    "reportingInstance": "x",
                    "action": "Test",
                    "type": "Normal",
                    "reason": "Happened",
                    "note": f"note {i}",
                    "regarding": {"kind": kind, "name": name, "namespace": "default", "uid": uid},
                }
            )
        assert [event.note for event in client.events("told")] == ["note 1", "note 0"]
        following = client.events("told", follow=True)
        assert {next(following).note for _ in range(2)} == {"note 0", "note 1"}
