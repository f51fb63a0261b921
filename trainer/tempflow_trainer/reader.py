"""What the cluster sees of a store, for somebody outside: ``python -m tempflow_trainer.reader``.

``tempflow pull --via-cluster`` starts it in a pod and talks to it by the API server. It listens on
the pod's loopback only, so nobody reaches it but who may forward ports of that pod; it reads one
run and, when asked to probe, writes what a start of a run writes.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

from tempflow_api import naming
from tempflow_api.errors import ManifestInvalid, Problem, StoreUnavailable, TempFlowError
from tempflow_api.storage import Checkpoint
from tempflow_trainer.store import open_at
from tempflow_trainer.store_base import Store

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
IDLE_SECONDS = 600.0
"""Whoever asked is gone by then: a laptop that was closed deletes no pod."""
MOST_BYTES = 64 << 20
"""Of one answer, which lies in memory."""


class Reader:
    """Serves one store until it is idle for too long."""

    def __init__(self, store: Store, port: int, idle_seconds: float = IDLE_SECONDS) -> None:
        self._store, self._idle_seconds = store, idle_seconds
        self._asked_at = time.monotonic()
        self._server = ThreadingHTTPServer((LOOPBACK, port), _handler(self))
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def serve(self) -> None:
        """Until ``stop``, or until nobody has asked for ``idle_seconds``."""
        threading.Thread(target=self._stop_when_idle, daemon=True).start()
        self._server.serve_forever(poll_interval=0.1)
        self._server.server_close()

    def stop(self) -> None:
        # Not in the caller's thread: that of a signal is the one that serves.
        threading.Thread(target=self._server.shutdown, daemon=True).start()

    def _stop_when_idle(self) -> None:
        while (left := self._asked_at + self._idle_seconds - time.monotonic()) > 0:
            time.sleep(left)
        log.info("nobody has asked for %.0f s", self._idle_seconds)
        self.stop()

    def answer(self, method: str, target: str) -> tuple[int, bytes]:
        """Status and body for one request; a refusal is JSON with a ``message``."""
        self._asked_at = time.monotonic()
        address = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        try:
            return self._found(f"{method} {address.path}", query)
        except (KeyError, ValueError) as error:
            return _refusal(HTTPStatus.BAD_REQUEST, f"{target}: {error}")
        except StoreUnavailable as error:
            return _refusal(HTTPStatus.BAD_GATEWAY, str(error))
        finally:
            self._asked_at = time.monotonic()

    def _found(self, request: str, query: dict[str, str]) -> tuple[int, bytes]:
        if request == f"GET {naming.READER_READY}":
            return HTTPStatus.OK, b""
        if request == f"GET {naming.READER_FILES}":
            return HTTPStatus.OK, json.dumps(self._store.find(_inside(query["below"]))).encode()
        if request == f"GET {naming.READER_CONTENT}":
            start, length = int(query["start"]), int(query["length"])
            return self._content(_inside(query["key"]), start, length)
        if request == f"POST {naming.READER_PROBE}":
            self._store.probe()
            return HTTPStatus.OK, b""
        return _refusal(HTTPStatus.BAD_REQUEST, f"{request} is not known to this image's tempflow")

    def _content(self, key: str, start: int, length: int) -> tuple[int, bytes]:
        if start < 0 or not 0 < length <= MOST_BYTES:
            raise ValueError(f"expects a range of 1 to {MOST_BYTES} bytes")
        try:
            return HTTPStatus.OK, self._store.read_range(key, start, length)
        except StoreUnavailable:
            if self._store.find(key):
                raise
            return _refusal(HTTPStatus.NOT_FOUND, f"{self._store.uri}/{key}: there is none")


def _inside(key: str) -> str:
    if ".." in key.split("/") or key.startswith("/"):
        raise ValueError(f"{key} leads out of the run")
    return key


def _refusal(status: HTTPStatus, message: str) -> tuple[int, bytes]:
    return status, json.dumps({"message": message}).encode()


def _handler(reader: Reader) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # a connection costs several round trips here: keep it
        timeout = reader._idle_seconds

        def do_GET(self) -> None:
            self._respond("GET")

        def do_POST(self) -> None:
            self._respond("POST")

        def _respond(self, method: str) -> None:
            status, body = reader.answer(method, self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name)
            """The store's own answers are what matters."""

    return Handler


def store_of(text: str) -> Store:
    """The store that the environment describes.

    Raises:
        ManifestInvalid: it is no ``spec.checkpoint``, or has no address.
    """
    try:
        described = Checkpoint.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ManifestInvalid(naming.ENV_STORE, [Problem(where, problem["msg"])]) from None
    if described.uri is None:
        raise ManifestInvalid(naming.ENV_STORE, [Problem("uri", "is missing")])
    return open_at(described.uri, described)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        reader = Reader(store_of(os.environ.get(naming.ENV_STORE, "{}")), naming.READER_PORT)
    except TempFlowError as error:
        log.error("error: %s", error)
        return error.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: reader.stop())
    reader.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
