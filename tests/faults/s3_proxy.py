"""An HTTP proxy in front of an S3 server, which breaks what it is told to.

It names each request as S3's documentation does, keeps a log, and asks its faults, in order, what
to do. The server's own behaviour is untouched: what the proxy lets through has happened.
"""

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Seen:
    """One request."""

    operation: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.operation} {self.key}"


@dataclass
class Fault:
    """What happens to requests that match. Without any effect they are only counted."""

    operation: str = ".*"
    """Regular expression for the whole name."""
    key: str = ""
    """Regular expression for some part of the key."""
    skip: int = 0
    times: int = 1_000_000
    status: int | None = None
    """Answered instead of asking the server."""
    code: str = "InternalError"
    delay_seconds: float = 0.0
    body_bytes_per_second: float | None = None
    strip: str = ""
    """Name of a header that the server does not get."""
    reset_after: int | None = None
    """The connection breaks after so many bytes of the request's body."""
    before: Callable[[Seen], None] = lambda _seen: None
    """Called before the server gets the request; may wait."""
    after: Callable[[Seen], None] = lambda _seen: None
    """Called when the server has applied it."""
    lose_reply: bool = False
    """The server applies it, and the client hears nothing."""
    cut_reply: int | None = None
    """The connection breaks after so many bytes of the reply's body."""
    flip_reply: bool = False
    """One bit of the reply's body is another one."""
    seen: int = 0

    def takes(self, request: Seen) -> bool:
        """Whether it is for this request; counts those that match."""
        if not re.fullmatch(self.operation, request.operation):
            return False
        if not re.search(self.key, request.key):
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times


def name_of(method: str, target: str) -> Seen:
    """Operation, bucket and key of a request with path-style addressing."""
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    bucket, _, key = parts.path.lstrip("/").partition("/")
    if not key:
        listing = "ListObjects" if bucket else "ListBuckets"
        prefix = query.get("prefix", [""])[0]
        by_method = {"GET": listing, "PUT": "CreateBucket", "HEAD": "HeadBucket"}
        if method == "POST" and "delete" in query:
            return Seen("DeleteObjects", bucket, "")
        return Seen(by_method.get(method, method), bucket, prefix)
    if "uploadId" in query:
        names = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortUpload"}
        return Seen(names.get(method, "ListParts"), bucket, key)
    if "uploads" in query:
        return Seen("CreateMultipartUpload", bucket, key)
    names = {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
    return Seen(names.get(method, method), bucket, key)


@dataclass
class Proxy:
    """A running proxy; faults may be added and removed at any time."""

    endpoint: str
    log: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fault: Fault) -> Fault:
        with self.lock:
            self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """As if it had just been started."""
        with self.lock:
            self.faults.clear()
            self.log.clear()

    def fault_for(self, request: Seen) -> Fault:
        """The first that takes the request; one without effect if none does."""
        with self.lock:
            self.log.append(request)
            taking = [fault for fault in self.faults if fault.takes(request)]
        return taking[0] if taking else Fault()


@contextmanager
def proxy(server: str) -> Iterator[Proxy]:
    """A proxy in front of the server at this address, while the context lasts."""
    address = urlsplit(server)
    made = Proxy("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            request = name_of(self.command, self.path)
            with suppress(OSError):
                _serve(self, request, made.fault_for(request), str(address.netloc))

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name)
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    made.endpoint = f"http://127.0.0.1:{listening.server_address[1]}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield made
    finally:
        listening.shutdown()
        listening.server_close()


def _serve(handler: BaseHTTPRequestHandler, request: Seen, fault: Fault, server: str) -> None:
    body = _body(handler, fault)
    if body is None:
        _hang_up(handler)
        return
    fault.before(request)
    time.sleep(fault.delay_seconds)
    if fault.status is not None:
        text = f"<Error><Code>{fault.code}</Code><Message>of the test</Message></Error>"
        _answer(handler, fault.status, [("Content-Type", "application/xml")], text.encode(), None)
        return
    headers = {k: v for k, v in handler.headers.items() if k.lower() != fault.strip.lower()}
    headers.pop("Expect", None)
    connection = http.client.HTTPConnection(server, timeout=60)
    try:
        connection.request(handler.command, handler.path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
    finally:
        connection.close()
    fault.after(request)
    if fault.lose_reply:
        _hang_up(handler)
        return
    if fault.flip_reply and content:
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    _answer(handler, reply.status, reply.getheaders(), content, fault.cut_reply)


def _body(handler: BaseHTTPRequestHandler, fault: Fault) -> bytes | None:
    """The request's body; None when the connection is to break within it."""
    length = int(handler.headers.get("Content-Length") or 0)
    body = b""
    while len(body) < length:
        if fault.reset_after is not None and len(body) >= fault.reset_after:
            return None
        block = handler.rfile.read(min(_BLOCK, length - len(body)))
        if not block:
            return None
        body += block
        if fault.body_bytes_per_second:
            time.sleep(len(block) / fault.body_bytes_per_second)
    return body


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: list[tuple[str, str]],
    content: bytes,
    cut: int | None,
) -> None:
    handler.send_response_only(status)
    kept = {"content-length", "transfer-encoding", "connection"}
    length = str(len(content))
    for name, value in headers:
        if handler.command == "HEAD" and name.lower() == "content-length":
            length = value
        if name.lower() not in kept:
            handler.send_header(name, value)
    handler.send_header("Content-Length", length)
    handler.end_headers()
    handler.wfile.write(content if cut is None else content[:cut])
    if cut is not None:
        _hang_up(handler)


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)
