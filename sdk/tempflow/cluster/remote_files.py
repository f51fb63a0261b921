"""A run's files as a reader pod sees them, in the form in which the rest of the SDK reads stores.

Nothing is written through it. A request whose connection breaks is repeated over a new one; every
thread has its own.
"""

import json
import threading
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.parse import urlencode

from fsspec import AbstractFileSystem

from tempflow.cluster.errors import ClusterError, Unreachable
from tempflow.cluster.tunnel import Tunnel, TunnelledHttp
from tempflow.cluster.watching import Patience
from tempflow_api import naming
from tempflow_api.errors import StoreUnavailable

_BLOCK_BYTES = 8 << 20
_NOT_FOUND, _OK = 404, 200


class RemoteFiles(AbstractFileSystem):  # type: ignore[misc]  # no types
    """Read only; paths begin with ``root``, which is the folder that the pod serves."""

    cachable = False

    def __init__(
        self,
        root: str,
        open_tunnel: Callable[[], Tunnel],
        still_there: Callable[[], None],
        give_up_seconds: float | None,
    ) -> None:
        """``still_there`` raises what has happened to a pod that will not come back."""
        super().__init__()
        self._root = root.rstrip("/")
        self._open_tunnel, self._still_there = open_tunnel, still_there
        self._give_up_seconds = give_up_seconds
        self._threads = threading.local()

    def ready(self) -> None:
        """Raises Unreachable as long as nobody listens in the pod."""
        self._once("GET", naming.READER_READY, {})

    def probe(self) -> None:
        """Have the pod do in the store what a start of a run does. Raises StoreUnavailable."""
        self._ask("POST", naming.READER_PROBE, {})

    def ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:
        folder = self._key(path)
        inside = f"{folder}/" if folder else ""
        found: dict[str, Any] = {}
        for key, size in self._files(folder).items():
            first, _, deeper = key.removeprefix(inside).partition("/")
            whole = f"{self._root}/{inside}{first}"
            kind = "directory" if deeper else "file"
            found[whole] = {"name": whole, "size": 0 if deeper else size, "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values() if detail else found)

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        key = self._key(path)
        files = self._files(key)
        if key in files:
            return {"name": path, "size": files[key], "type": "file"}
        if not files:
            raise FileNotFoundError(path)
        return {"name": path, "size": 0, "type": "directory"}

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_options: Any
    ) -> bytes:
        at, blocks = start or 0, []
        while end is None or at < end:
            length = _BLOCK_BYTES if end is None else min(_BLOCK_BYTES, end - at)
            query = {"key": self._key(path), "start": str(at), "length": str(length)}
            block = self._ask("GET", naming.READER_CONTENT, query)
            blocks.append(block)
            at += len(block)
            if len(block) < length:
                break
        return b"".join(blocks)

    def _files(self, below: str) -> dict[str, int]:
        found: dict[str, int] = json.loads(self._ask("GET", naming.READER_FILES, {"below": below}))
        return found

    def _ask(self, method: str, path: str, query: dict[str, str]) -> bytes:
        patience = Patience(self._give_up_seconds)
        while True:
            try:
                return self._once(method, path, query)
            except ClusterError as error:
                self._still_there()
                patience.endure(error)

    def _once(self, method: str, path: str, query: dict[str, str]) -> bytes:
        http = self._connection()
        try:
            http.request(method, f"{path}?{urlencode(query)}")
            response = http.getresponse()
            body = response.read()
        except (HTTPException, OSError) as error:
            self._drop()
            reason = str(error) or type(error).__name__
            raise Unreachable(f"the reader pod did not answer ({reason})") from error
        except ClusterError:
            self._drop()
            raise
        if response.status == _OK:
            return body
        message = json.loads(body)["message"]
        if response.status == _NOT_FOUND:
            raise FileNotFoundError(message)
        raise StoreUnavailable(f"inside the cluster: {message}")

    def _connection(self) -> TunnelledHttp:
        if getattr(self._threads, "http", None) is None:
            self._threads.http = TunnelledHttp(self._open_tunnel)
        http: TunnelledHttp = self._threads.http
        return http

    def _drop(self) -> None:
        http, self._threads.http = self._threads.http, None
        http.close()

    def _key(self, path: str) -> str:
        return path.removeprefix(self._root).strip("/")
