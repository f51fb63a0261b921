"""A proxy in front of a reward service that does what networks and servers do on bad days."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from tempflow_trainer.rewards import wire

Scores = list[dict[str, Any]]
SLOW_SECONDS = 0.3


@dataclass
class FaultProxy:
    """Passes requests on to ``target``; the next ``times`` requests for scores meet ``fault``."""

    target: str
    fault: str = "none"
    times: int = 0
    requests: int = 0
    """For scores, since the last ``set``."""
    _session: list[aiohttp.ClientSession] = field(default_factory=list)

    def set(self, fault: str, times: int) -> None:
        self.fault, self.times, self.requests = fault, times, 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self._pass)

        async def close(_app: web.Application) -> None:
            for session in self._session:
                await session.close()

        app.on_cleanup.append(close)
        return app

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = "none"
        if request.path == wire.SCORE_PATH:
            self.requests += 1
            fault = self.fault if self.requests <= self.times else "none"
        if fault == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
        if fault.isdigit():
            return web.json_response(
                {"error": "a bad day"}, status=int(fault), headers={"Retry-After": "0.1"}
            )
        status, content = await self._forward(request, body)
        if fault == "truncated":
            return await self._truncated(request, content)
        if fault in CHANGES and status == 200:
            reply = json.loads(content)
            reply["scores"] = CHANGES[fault](reply["scores"])
            content = json.dumps(reply).encode()
        return web.Response(body=content, status=status, content_type="application/json")

    async def _forward(self, request: web.Request, body: bytes) -> tuple[int, bytes]:
        if not self._session:
            self._session.append(aiohttp.ClientSession())
        headers = {"Content-Type": request.headers.get("Content-Type", "text/plain")}
        url = self.target + request.path
        async with self._session[0].request(
            request.method, url, data=body, headers=headers
        ) as reply:
            return reply.status, await reply.read()

    @staticmethod
    async def _truncated(request: web.Request, content: bytes) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "application/json"})
        reply.content_length = len(content)
        await reply.prepare(request)
        await reply.write(content[: len(content) // 2])
        assert request.transport is not None
        request.transport.close()
        return reply


def _first(scores: Scores, **changes: object) -> Scores:
    return [{**scores[0], **changes}, *scores[1:]]


CHANGES: dict[str, Callable[[Scores], Scores]] = {
    "too few": lambda scores: scores[:-1],
    "too many": lambda scores: [*scores, scores[-1]],
    "wrong order": lambda scores: scores[::-1],
    "nan": lambda scores: _first(scores, score=float("nan")),
    "infinite": lambda scores: _first(scores, score=float("inf")),
}


@contextmanager
def proxied(target: str, port: int = 0) -> Iterator[tuple[str, FaultProxy]]:
    """The address of a running proxy, and the proxy."""
    proxy = FaultProxy(target)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[web.AppRunner, str]:
        runner = web.AppRunner(proxy.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    runner, url = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield url, proxy
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
