"""/healthz, /readyz and /metrics, and the proof that watches deliver."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from tempflow_operator.metrics import Metrics

Stream = tuple[str, str]
"""Kind and namespace; the namespace is empty where one stream covers the cluster."""


@dataclass
class WatchProof:
    """Whether each watch has delivered what a list has shown.

    A stream that has silently died looks like a quiet cluster. But passes list objects anyway:
    when a list shows a newer version than any that the stream has brought, the stream owes it.
    """

    clock: Callable[[], float]
    by_namespace: bool = False
    _newest: dict[Stream, int] = field(default_factory=dict)
    _owed: dict[Stream, tuple[int, float]] = field(default_factory=dict)

    def saw(self, kind: str, namespace: str, version: str) -> None:
        """The watch has delivered an object."""
        if not version.isdecimal():
            return
        stream = self._stream(kind, namespace)
        newest = self._newest[stream] = max(self._newest.get(stream, 0), int(version))
        owed = self._owed.get(stream)
        if owed is not None and newest >= owed[0]:
            del self._owed[stream]

    def expect(self, namespace: str, listed: Mapping[str, int]) -> None:
        """A list has shown objects up to these versions, by kind."""
        for kind, version in listed.items():
            stream = self._stream(kind, namespace)
            if version > self._newest.get(stream, 0) and stream not in self._owed:
                self._owed[stream] = (version, self.clock())

    def longest_debt(self) -> float:
        """Seconds for which a stream has owed what a list has shown."""
        now = self.clock()
        return max((now - since for _, since in self._owed.values()), default=0.0)

    def _stream(self, kind: str, namespace: str) -> Stream:
        return kind, namespace if self.by_namespace else ""


Check = Callable[[], str]
"""What is wrong, in a line; empty when all is well."""


class ProbeServer:
    """Answers kubelet and Prometheus. That it answers proves that the event loop turns."""

    def __init__(
        self, port: int, *, alive: Check, metrics: Metrics, host: str | None = None
    ) -> None:
        """Without ``host`` on all addresses: kubelet and Prometheus come from outside the pod."""
        self._port = port
        self._host = host
        self._metrics = metrics
        self._app = web.Application()
        self._app.router.add_get("/healthz", self._probe(alive))
        # A replica that waits for the Lease is ready: it has no traffic to serve.
        self._app.router.add_get("/readyz", self._probe(lambda: ""))
        self._app.router.add_get("/metrics", self._show_metrics)
        self._runner = web.AppRunner(self._app, access_log=None)

    async def start(self) -> int:
        """Serve from now on; returns the port, which the system chooses where 0 was asked for."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host=self._host, port=self._port)
        await site.start()
        port: int = self._runner.addresses[0][1]
        return port

    async def stop(self) -> None:
        await self._runner.cleanup()

    def _probe(self, check: Check) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            problem = check()
            return web.Response(text=problem or "ok", status=503 if problem else 200)

        return answer

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), content_type="text/plain", charset="utf-8")
