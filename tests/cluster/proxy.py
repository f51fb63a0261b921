"""Between an operator and the API server: sees every write, and can cut the line at any of them."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

import aiohttp
from aiohttp import web

from tempflow_api import naming
from tests.cluster.layout import LOOPBACK

_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_HOP_BY_HOP = frozenset(
    {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "content-encoding"}
)


class How(StrEnum):
    """What becomes of the write at which the line is cut."""

    KILLED_BEFORE = "killed before it is sent"
    KILLED_AFTER = "killed before it is answered"
    UNANSWERED = "carried out, the answer is lost"
    REFUSED = "not carried out, 429 or 500"


_REFUSALS = (429, 500)


@dataclass
class Writes:
    """The writes of one job, and the one at which the line is cut; None: none."""

    cut: int | None = None
    how: How = How.UNANSWERED
    count: int = 0
    done: list[str] = field(default_factory=list)

    @property
    def was_cut(self) -> bool:
        return self.cut is not None and self.count >= self.cut


class Proxy:
    """Plain HTTP on loopback, in front of a server with a certificate of its own."""

    def __init__(self, url: str, kill: Callable[[], None]) -> None:
        """``kill`` ends the client's process."""
        self._url = url
        self._kill = kill
        self.jobs: dict[str, Writes] = {}
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def start(self) -> str:
        """Returns its address."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=False, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, 0).start()
        return f"http://{LOOPBACK}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        writes = self._counted(request, body)
        cut = writes is not None and writes.count == writes.cut
        if writes is not None and cut and writes.how is How.KILLED_BEFORE:
            self._kill()
            return _no_answer(request)
        if writes is not None and cut and writes.how is How.REFUSED:
            return web.Response(status=_REFUSALS[writes.count % 2], headers={"Retry-After": "1"})
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        async with self._session.request(
            request.method, self._url + request.raw_path, headers=headers, data=body or None
        ) as answer:
            if writes is not None and cut:
                await answer.read()
                if writes.how is How.KILLED_AFTER:
                    self._kill()
                return _no_answer(request)
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
            if "Content-Encoding" in answer.headers:
                kept["Content-Encoding"] = answer.headers["Content-Encoding"]
            response = web.StreamResponse(status=answer.status, headers=kept)
            with suppress(ConnectionError):  # the one who asked was killed
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
            return response

    def _counted(self, request: web.Request, body: bytes) -> Writes | None:
        """The account of the job that the request writes for, with the request in it."""
        if request.method not in _WRITES:
            return None
        writes = self.jobs.get(_job_of(request.path, body, self.jobs))
        if writes is not None:
            writes.count += 1
            writes.done.append(f"{request.method} {request.path}")
        return writes


def _job_of(path: str, body: bytes, jobs: dict[str, Writes]) -> str:
    """Empty where the write is for no job that is known, as with a Lease."""
    content = json.loads(body) if body else {}
    if isinstance(content, dict):
        labels = content.get("metadata", {}).get("labels", {})
        named = content.get("regarding", {}).get("name") or labels.get(naming.LABEL_JOB_NAME)
        if named:
            return str(named)
    for segment in path.split("/"):
        for job in jobs:
            if segment == job or segment.startswith((f"{job}-a", f"{job}.")):
                return job
    return ""


def _no_answer(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)  # nobody is there to read it
