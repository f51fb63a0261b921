"""One TCP connection to a port of a pod, inside a WebSocket to the API server.

What ``kubectl port-forward`` does, for a program. Each frame begins with the number of a channel:
0 carries the bytes, 1 what the kubelet complains of, and the first frame of either only repeats the
port. The Kubernetes client has such a class as well; it works in a thread of its own, which no
time-out reaches and which prints what goes wrong there.
"""

import io
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

from kubernetes.client import Configuration
from kubernetes.stream.ws_client import websocket_proxycare
from websocket import ABNF, WebSocket, WebSocketException

from tempflow.cluster.errors import Unreachable

PROTOCOL = "v4.channel.k8s.io"
_DATA, _ERROR = 0, 1
_FRAME_BYTES = 1 << 16
_PORT_BYTES = 2


def open_websocket(
    settings: Configuration, url: str, headers: Mapping[str, str], timeout_seconds: float
) -> WebSocket:
    """The API server's answer to an upgrade; time-outs hold for it and for every later frame.

    Raises what the websocket's library does.
    """
    secure: dict[str, Any] = {"cert_reqs": ssl.CERT_NONE, "check_hostname": False}
    if settings.verify_ssl:
        secure = {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": settings.ssl_ca_cert}
        if settings.assert_hostname is not None:
            secure["check_hostname"] = settings.assert_hostname
    names = {"certfile": settings.cert_file, "keyfile": settings.key_file}
    names["server_hostname"] = settings.tls_server_name
    secure |= {name: value for name, value in names.items() if value}
    sent = [f"authorization: {value}" for name, value in headers.items() if _authorizes(name)]
    options: dict[str, Any] = {"header": sent, "subprotocols": [PROTOCOL]}
    if settings.proxy or settings.proxy_headers:
        options = websocket_proxycare(options, settings, url, headers)  # type: ignore[no-untyped-call]
    websocket = WebSocket(sslopt=secure)
    address = url.replace("http", "ws", 1)
    websocket.connect(address, timeout=timeout_seconds, **options)  # type: ignore[no-untyped-call]
    return websocket


def _authorizes(name: str) -> bool:
    return name.lower() == "authorization"


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except (WebSocketException, OSError) as error:
        raise Unreachable(f"the connection to the pod broke ({error})") from error


class Tunnel(io.RawIOBase):
    """The connection as ``http.client`` uses a socket: ``sendall``, ``makefile`` and ``close``."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._announced: set[int] = set()
        self._rest = b""

    def sendall(self, data: bytes) -> None:
        with _broken():
            for start in range(0, len(data), _FRAME_BYTES):
                self._websocket.send_binary(bytes([_DATA]) + data[start : start + _FRAME_BYTES])

    def makefile(self, mode: str) -> io.BufferedReader:
        """To read from, whatever the mode; closing it leaves the connection open."""
        del mode
        return io.BufferedReader(_Reading(self))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Waits for bytes; 0 at the end.

        Raises Unreachable when the kubelet cannot reach the port, or the connection breaks.
        """
        while not self._rest:
            with _broken():
                kind, frame = self._websocket.recv_data()
            if kind == ABNF.OPCODE_CLOSE:
                return 0
            self._take(frame)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _take(self, frame: bytes) -> None:
        channel, content = frame[0], frame[1:]
        if channel not in self._announced and len(content) == _PORT_BYTES:
            self._announced.add(channel)
        elif channel == _ERROR:
            raise Unreachable(content.decode(errors="replace").strip() or "the port is closed")
        else:
            self._rest = content

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._websocket.shutdown()  # type: ignore[no-untyped-call]


class _Reading(io.RawIOBase):
    """A view of a tunnel that can be closed, as ``http.client`` does after each answer."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._tunnel.readinto(buffer)


class TunnelledHttp(HTTPConnection):
    """HTTP to a port of a pod."""

    def __init__(self, open_tunnel: Callable[[], Tunnel]) -> None:
        super().__init__("pod")
        self._open_tunnel = open_tunnel

    def connect(self) -> None:
        self.sock = self._open_tunnel()
