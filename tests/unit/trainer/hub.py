"""A Hugging Face hub on the loopback interface: answers what the client of the hub asks."""

import hashlib
import json
from collections.abc import Set
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"


class Hub:
    """Serves the folders below ``root`` as ``owner/name``; some only to a token, some damaged."""

    def __init__(self, root: Path, *, gated: set[str], damaged: Set[str] = frozenset()) -> None:
        self.root, self.gated, self.damaged = root, gated, damaged
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(path)
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        folder = self.root / name
        authorised = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        revision = (parts[5:6] if api else parts[3:4]) or ["main"]
        if not folder.is_dir():
            self._refuse(request, 401, "RepoNotFound")
        elif name in self.gated and not authorised:
            self._refuse(request, 403 if "Authorization" in request.headers else 401, "GatedRepo")
        elif revision[0] not in ("main", COMMIT):
            self._refuse(request, 404, "RevisionNotFound")
        elif api:
            self._describe(request, folder, name, "tree" in parts, body=body)
        else:
            self._file(request, folder.joinpath(*parts[4:]), body=body)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _describe(
        self,
        request: BaseHTTPRequestHandler,
        folder: Path,
        name: str,
        tree: bool,
        *,
        body: bool,
    ) -> None:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
        found: object = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        if tree:
            found = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": _digest(f)}
                for n, f in zip(names, files, strict=True)
            ]
        self._send(request, json.dumps(found).encode(), {}, body=body)

    def _file(self, request: BaseHTTPRequestHandler, file: Path, *, body: bool) -> None:
        if not file.is_file():
            self._refuse(request, 404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(file)}"'}
        content = file.read_bytes()
        if file.relative_to(self.root).as_posix() in self.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(request, content, headers, body=body)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        content: bytes,
        headers: dict[str, str],
        *,
        body: bool,
    ) -> None:
        request.send_response(200)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            request.wfile.write(content)


def _digest(file: Path) -> str:
    """Large files are told by their SHA-256, as the hub's store of them does, others by SHA-1."""
    if file.suffix == ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
