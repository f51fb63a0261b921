"""The operator's process: ``python -m tempflow_operator.main``.

An event names a job, ``workqueue`` starts a pass for it, ``reconcile`` makes the pass. This file
puts the parts together, and says who stops whom.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from tempflow_api import naming
from tempflow_operator import logs
from tempflow_operator import settings as configuration
from tempflow_operator.cluster import ApiError, Cluster
from tempflow_operator.decisions.observed import Key
from tempflow_operator.lastwords import Heard
from tempflow_operator.leader import Leader, LeadershipLost
from tempflow_operator.metrics import Metrics
from tempflow_operator.probes import ProbeServer, WatchProof
from tempflow_operator.progress import ProgressReader
from tempflow_operator.reconcile import Obstructed, Reconciler
from tempflow_operator.settings import Settings
from tempflow_operator.watches import Watches
from tempflow_operator.workqueue import Workers

logger = logging.getLogger(__name__)


class Operator:
    """The parts of one replica."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._cluster = cluster
        self._metrics = metrics
        self._leading = False
        self._leader = Leader(cluster, settings.lease)
        self._proof = WatchProof(clock, by_namespace=bool(settings.namespaces))
        heard = Heard()
        self._watches = Watches(settings.namespaces, self._saw, heard.note)
        self._progress = ProgressReader(
            settings.progress,
            clock=clock,
            on_change=lambda key: self._workers.add(key),
            metrics=metrics,
        )
        reconciler = Reconciler(
            cluster,
            settings,
            progress=self._progress,
            heard=heard,
            watches=self._proof,
            metrics=metrics,
        )
        self._workers = Workers(
            settings.queue, reconciler.run_pass, clock=clock, on_error=self._on_error
        )
        metrics.watch_queue(self._depth, self._longest_wait)

    async def run(self) -> None:
        """Until it is cancelled; LeadershipLost when another replica may act from now on."""
        probes = ProbeServer(
            self._settings.health.port, alive=self.what_is_wrong, metrics=self._metrics
        )
        await probes.start()
        try:
            if self._settings.lease.enabled:
                await self._lead()
            else:
                await self._work()
        finally:
            await probes.stop()

    async def _lead(self) -> None:
        await self._leader.acquire()
        try:
            await first_of(self._work(), self._leader.hold())
        finally:
            # Only now, when nothing works any more. Whoever waits need not let the Lease run out.
            await self._leader.release()

    async def _work(self) -> None:
        self._leading = True
        self._metrics.leader.set(1)
        try:
            await first_of(
                self._workers.run(), self._progress.run(), self._resync(), self._watches.run()
            )
        finally:
            self._metrics.leader.set(0)
            self._leading = False

    def _saw(self, kind: str, namespace: str, version: str, job: str) -> None:
        self._metrics.events.labels(kind).inc()
        self._proof.saw(kind, namespace, version)
        if job:
            # What somebody wants of a job comes before what its pods do.
            wanted = kind == naming.PLURAL
            settle = 0.0 if wanted else self._settings.queue.settle
            self._workers.add(Key(namespace, job), delay=settle, urgent=wanted)

    async def _resync(self) -> None:
        """Lists all jobs now and then: repairs what lost events broke."""
        while True:
            try:
                await self._list_all()
            except (ApiError, OSError, TimeoutError) as error:
                logger.warning("list of all jobs: %s: %s", type(error).__name__, error)
            await asyncio.sleep(self._settings.queue.resync)

    async def _list_all(self) -> None:
        phases: Counter[str] = Counter()
        for namespace in self._settings.namespaces or (None,):
            async for raw in self._cluster.training_jobs(namespace):
                phases[(raw.get("status") or {}).get("phase", "Pending")] += 1
                metadata = raw["metadata"]
                self._workers.add(Key(metadata["namespace"], metadata["name"]))
        self._metrics.set_jobs(phases)

    def _on_error(self, key: Key, error: Exception, delay: float) -> None:
        self._metrics.errors.labels(type(error).__name__).inc()
        # What the API server or the network did is understood; of anything else, the place matters.
        known = isinstance(error, Obstructed | ApiError | OSError | TimeoutError)
        text = "pass of %s failed, again in %.1f s: %s: %s"
        logger.warning(text, key, delay, type(error).__name__, error, exc_info=not known)

    def _depth(self) -> float:
        return self._workers.schedule.depth(self._clock())

    def _longest_wait(self) -> float:
        return self._workers.schedule.longest_wait(self._clock())

    def what_is_wrong(self) -> str:
        """For the liveness probe; a replica that waits for the Lease has nothing to prove."""
        limits = self._settings.health
        if self._leading and self._longest_wait() > limits.queue_stuck:
            return f"a job waits for its pass for {self._longest_wait():.0f} s"
        if self._leading and self._proof.longest_debt() > limits.watch_stuck:
            return f"a watch is {self._proof.longest_debt():.0f} s behind a list"
        return ""


async def first_of(*parts: Coroutine[Any, Any, object]) -> None:
    """Runs all until one ends, then ends the others and waits for that; an error is passed on."""
    tasks = [asyncio.create_task(part) for part in parts]
    done: set[asyncio.Task[object]] = set()
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics()
    cluster = await Cluster.connect(metrics, settings.pods.gang_scheduler)
    try:
        await first_of(stop.wait(), Operator(settings, cluster, metrics).run())
    finally:
        await cluster.close()


def main() -> int:
    try:
        settings = configuration.from_environment(os.environ)
    except configuration.SettingInvalid as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.set_up(settings.logs)
    try:
        asyncio.run(serve(settings))
    except LeadershipLost as lost:
        logger.error("leadership lost, exiting: %s", lost)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
