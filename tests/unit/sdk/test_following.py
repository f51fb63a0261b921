"""What follows a cluster bears silence, and is over when it was told to be."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempflow import Client, WaitTimeout
from tempflow.cluster.errors import ClusterError, Silent
from tempflow.cluster.logs import PodLog, follow_one
from tempflow.cluster.watching import Patience, changes
from tempflow_api import naming

Answer = list[bytes] | ClusterError
RUNNING = {"phase": "Running"}
SUCCEEDED = {"phase": "Succeeded"}


class Scripted:
    """A connection whose streams and requests are given beforehand, in their order."""

    def __init__(self, streams: list[Answer], answers: list[dict[str, Any]]) -> None:
        self.streams, self.answers = streams, answers
        self.asked: list[dict[str, str]] = []

    @contextmanager
    def stream(self, _path: str, query: dict[str, str], **_: Any) -> Iterator[Iterator[bytes]]:
        self.asked.append(query)
        answer = self.streams.pop(0)

        def lines() -> Iterator[bytes]:
            if isinstance(answer, ClusterError):
                raise answer
            yield from answer

        yield lines()

    def send(self, *_: Any, **__: Any) -> dict[str, Any]:
        return self.answers.pop(0)


def followed(connection: Scripted) -> list[str]:
    impatient = Patience(give_up_seconds=0, sleep=lambda _: None)
    log = PodLog("default", "pod", 1, 0)
    lines = follow_one(connection, log, impatient)  # type: ignore[arg-type]
    return [line.text for _, line in lines]


def test_a_pod_that_says_nothing_for_long_is_followed_on() -> None:
    """As in a long epoch: every silence is a stream that was opened."""
    silence: list[Answer] = [Silent("nothing comes") for _ in range(9)]
    said = [b"2026-01-31T12:00:00Z after an hour"]
    connection = Scripted([*silence, said, []], [{"status": RUNNING}] * 9 + [{"status": SUCCEEDED}])
    assert followed(connection) == ["after an hour"]


def test_an_end_of_which_the_stream_does_not_tell_is_seen() -> None:
    rest = [b"2026-01-31T12:00:00Z the last line"]
    connection = Scripted([Silent("nothing comes"), rest], [{"status": SUCCEEDED}])
    assert followed(connection) == ["the last line"]
    assert ["follow" in query for query in connection.asked] == [True, False]


def test_a_last_line_that_does_not_come_is_an_error() -> None:
    connection = Scripted([[], Silent("nothing comes")], [{"status": SUCCEEDED}])
    with pytest.raises(Silent):
        followed(connection)


def test_a_watch_that_says_nothing_is_asked_anew_from_where_it_was() -> None:
    about = {"uid": "u", "resourceVersion": "8"}
    entry = json.dumps({"type": "ADDED", "object": {"metadata": about}}).encode()
    nothing = {"items": [], "metadata": {"resourceVersion": "7"}}
    silence: list[Answer] = [Silent("nothing comes") for _ in range(5)]
    connection = Scripted([*silence, [entry]], [nothing])
    told = changes(connection, "/jobs", {}, what="jobs", give_up_seconds=0)  # type: ignore[arg-type]
    assert next(told)[0] == "added"
    assert {query["resourceVersion"] for query in connection.asked} == {"7"}


def test_less_patience_with_a_node_that_refuses_than_with_a_server_that_is_away() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def endured(error: ClusterError) -> float:
        patience = Patience(300, lambda: now[0], sleep, refused_seconds=15)
        start = now[0]
        while True:
            try:
                patience.endure(error)
            except ClusterError:
                return now[0] - start

    assert 15 <= endured(ClusterError("the kubelet does not answer", 502)) < 30
    assert endured(Silent("no API server")) >= 300


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Client]:
    """A client of a server that tells once of a job, and then leaves everything open."""
    over, told = threading.Event(), threading.Event()
    job = {"metadata": {"name": "x", "namespace": "default", "uid": "u", "resourceVersion": "1"}}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if "watch" in self.path:
                self.wfile.write(b"7\r\na line\n\r\n")
            elif not told.is_set():
                told.set()
                text = json.dumps({**job, "kind": naming.KIND}).encode()
                self.wfile.write(f"{len(text):x}\r\n".encode() + text + b"\r\n0\r\n\r\n")
                return
            over.wait()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "clusters": [
            {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        ],
        "users": [{"name": "c", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        "current-context": "c",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    with Client(kubeconfig=str(tmp_path / "kubeconfig")) as client:
        yield client
    over.set()
    server.shutdown()
    server.server_close()


def test_wait_is_over_in_time_although_nothing_answers(hanging: Client) -> None:
    started = time.monotonic()
    with pytest.raises(WaitTimeout, match=r"not Finished after 1 s, as far as is known: .*no answ"):
        hanging.wait("x", timeout_seconds=1)
    assert time.monotonic() - started < 10


def test_a_stream_that_says_nothing_more_is_silent(hanging: Client) -> None:
    stream = hanging.connection.stream("/watch", {}, what="jobs", idle_seconds=0.3)
    with stream as lines:
        assert next(lines) == b"a line"
        with pytest.raises(Silent):
            next(lines)
