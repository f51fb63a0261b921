"""The part of a kubelet that gives logs, and forwards ports: an HTTPS server.

The API server asks it as it asks any kubelet, so what a client sees of logs, their times, and their
ends comes over the real way.
"""

import ssl
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.cluster.layout import LOOPBACK
from tests.cluster.port_forward import forward

_START = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


@dataclass
class Log:
    """Of one container: lines with their nanoseconds since noon, and whether it has ended."""

    lines: list[tuple[int, str]] = field(default_factory=list)
    ended: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def write(self, nanos: int, text: str) -> None:
        with self.changed:
            self.lines.append((nanos, text))
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()


class Kubelet:
    """Listens on loopback; ``logs`` by pod, and ``ports`` of this machine for those of pods."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.logs: dict[str, Log] = {}
        self.ports: dict[str, int] = {}
        self.requests: list[str] = []
        kubelet = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                kubelet.requests.append(self.path)
                if self.path.startswith("/portForward/"):
                    forward(self, kubelet.ports[self.path.split("?")[0].split("/")[3]])
                else:
                    kubelet._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        """``/containerLogs/<namespace>/<pod>/<container>``"""
        address = urlsplit(request.path)
        pod = address.path.split("/")[3]
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        request.send_response(200)
        request.send_header("Content-Type", "text/plain")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        try:
            for line in self._lines(self.logs[pod], query):
                request.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                request.wfile.flush()
            request.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass  # the API server is gone

    def _lines(self, log: Log, query: dict[str, str]):  # type: ignore[no-untyped-def]  # bytes
        since = query.get("sinceTime", "")
        after = (
            int((datetime.fromisoformat(since.replace("Z", "+00:00")) - _START).total_seconds())
            if since
            else 0
        )
        position = max(0, len(log.lines) - int(query["tailLines"])) if "tailLines" in query else 0
        while True:
            with log.changed:
                while position >= len(log.lines) and not log.ended and query.get("follow"):
                    log.changed.wait(0.2)
                batch, over = log.lines[position:], log.ended or not query.get("follow")
            position += len(batch)
            for nanos, text in batch:
                if nanos >= after * 1_000_000_000:
                    yield f"{stamp(nanos)} {text}\n".encode()
            if over and not batch:
                return
            time.sleep(0)


def stamp(nanos: int) -> str:
    """The form in which a kubelet writes a time."""
    whole = _START + timedelta(seconds=nanos // 1_000_000_000)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{nanos % 1_000_000_000:09}Z"
