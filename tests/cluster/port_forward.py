"""The part of a kubelet that forwards ports: a WebSocket whose frames go to a port of this machine.

https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/kubelet/pkg/cri/streaming/portforward/websocket.go
"""

import base64
import hashlib
import socket
import struct
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from tests.cluster.layout import LOOPBACK

_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_BINARY, _CLOSE = 2, 8


def forward(request: BaseHTTPRequestHandler, target: int) -> None:
    """Answers ``/portForward/<namespace>/<pod>?port=N`` until either side has ended."""
    number = int(parse_qs(urlsplit(request.path).query)["port"][0])
    key = request.headers["Sec-WebSocket-Key"]
    accept = base64.b64encode(hashlib.sha1(f"{key}{_GUID}".encode()).digest())
    request.send_response(101)
    request.send_header("Upgrade", "websocket")
    request.send_header("Connection", "Upgrade")
    request.send_header("Sec-WebSocket-Accept", accept.decode())
    request.send_header("Sec-WebSocket-Protocol", request.headers["Sec-WebSocket-Protocol"])
    request.end_headers()
    request.wfile.flush()
    request.close_connection = True
    for channel in (0, 1):
        _send(request, bytes([channel]) + struct.pack("<H", number))
    try:
        pod = socket.create_connection((LOOPBACK, target))
    except OSError as error:
        _send(request, b"\x01" + f"error forwarding port {number}: {error}".encode())
        return
    threading.Thread(target=_back, args=(request, pod), daemon=True).start()
    with pod, suppress(OSError):
        while (frame := _receive(request)) is not None:
            pod.sendall(frame[1:])


def _back(request: BaseHTTPRequestHandler, pod: socket.socket) -> None:
    with suppress(OSError):
        while data := pod.recv(1 << 15):
            _send(request, b"\x00" + data)
        request.wfile.write(bytes([0x80 | _CLOSE, 0]))


def _send(request: BaseHTTPRequestHandler, content: bytes) -> None:
    size = len(content)
    head = bytes([size]) if size < 126 else b"\x7e" + struct.pack(">H", size)
    request.wfile.write(bytes([0x80 | _BINARY]) + head + content)
    request.wfile.flush()


def _receive(request: BaseHTTPRequestHandler) -> bytes | None:
    """The content of the next frame of a client, which are all masked; None at the end."""
    head = request.rfile.read(2)
    if len(head) < 2 or head[0] & 0xF == _CLOSE:
        return None
    size = head[1] & 0x7F
    if size == 126:
        (size,) = struct.unpack(">H", request.rfile.read(2))
    elif size == 127:
        (size,) = struct.unpack(">Q", request.rfile.read(8))
    mask = request.rfile.read(4)
    content = request.rfile.read(size)
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(content))
