"""The operator's process, killed at every write that it makes for a job, and answers that fail.

The operator is the real program, with the rights that the chart grants. Between it and a real API
server stands a proxy; the Job controller is real, and the test is the kubelet. A death between two
reads leaves what the last write left, so the cut points are all writes: before each is sent, after
each is carried out, and carried out with its answer lost on an operator that lives on. Such an
operator also meets a server that refuses each of them once, with 429 or 500.

All jobs share one operator: each sees the deaths of the others at any moment beside its own.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tempflow_api import naming
from tempflow_api.conditions import ConditionType, is_true
from tempflow_api.status import JobStatus
from tempflow_operator.cluster import Cluster
from tempflow_operator.metrics import Metrics
from tests.builders import Raw, make_job
from tests.cluster import bare, scenario
from tests.cluster.bare import Bare
from tests.cluster.forking import OperatorProcess
from tests.cluster.lives import NAMESPACE, connect, phase_of, set_pod, status_of, submit, what_lives
from tests.cluster.proxy import How, Proxy, Writes

pytestmark = pytest.mark.cluster

NODES = 2
DEADLINE_SECONDS = 180.0
AT_A_TIME = 12


@dataclass
class World:
    """Everything but the operator: one job, its user, and the kubelets of its pods."""

    admin: Cluster
    name: str
    most_alive: int = 0
    """Attempts that may run, at the worst moment."""
    final: JobStatus = field(default_factory=JobStatus)

    async def status(self) -> JobStatus:
        return await status_of(self.admin, self.name)

    async def turn(self) -> None:
        """Pods start; then the first attempt fails, and any other succeeds."""
        living, attempts = await what_lives(self.admin, self.name)
        self.most_alive = max(self.most_alive, len(attempts))
        await self._move(living)

    async def _move(self, living: list[Raw]) -> None:
        all_run = len(living) == NODES and all(phase_of(pod) == "Running" for pod in living)
        for pod in living:
            labels = pod["metadata"]["labels"]
            index = labels["batch.kubernetes.io/job-completion-index"]
            first = labels[naming.LABEL_ATTEMPT] == "1"
            if phase_of(pod) == "Pending":
                await set_pod(self.admin, pod, "Running", {"running": {}})
            elif all_run and not first:
                await set_pod(self.admin, pod, "Succeeded", {"terminated": {"exitCode": 0}})
            elif all_run and index == "1":
                await set_pod(self.admin, pod, "Failed", {"terminated": {"exitCode": 90}})

    async def live(self) -> "World":
        """From start to end."""
        await submit(self.admin, make_job(self.name).nodes(NODES))
        started = time.monotonic()
        while not is_true((await self.status()).conditions, ConditionType.FINISHED):
            late = time.monotonic() - started > DEADLINE_SECONDS
            assert not late, (self.name, await self.status())
            await self.turn()
            await asyncio.sleep(0.1)
        self.final = await self.status()
        return self


@contextmanager
def operating(server: Bare, url: str, folder: Path) -> Iterator[OperatorProcess]:
    """The operator, which finds the API server at ``url``."""
    kubeconfig = folder / "proxy.kubeconfig"
    kubeconfig.touch(mode=0o600)
    kubeconfig.write_text(json.dumps(bare.kubeconfig(url, server.operator_token)))
    settings = {
        "KUBECONFIG": str(kubeconfig),
        "POD_NAMESPACE": scenario.SYSTEM,
        "POD_NAME": "operator",
        "TEMPFLOW_LEASE_NAME": scenario.RELEASE,
        "TEMPFLOW_WATCH_NAMESPACES": NAMESPACE,
        "TEMPFLOW_HTTP_PORT": "0",  # each life one of its own: the killed one may still hold its
        "TEMPFLOW_RESTART_DELAY_SECONDS": "0.1",
    }
    process = OperatorProcess(settings, folder / "operator.log")
    try:
        yield process
    finally:
        process.end()


async def every_history(server: Bare, folder: Path) -> list[tuple[Writes, World]]:
    """The undisturbed history, and one for each of its writes and each way to cut the line."""
    lives: list[OperatorProcess] = []
    proxy = Proxy(server.url, lambda: lives[0].begin_again())
    admin = Cluster(connect(server), Metrics())

    def history(name: str, writes: Writes) -> tuple[Writes, World]:
        proxy.jobs[f"failed-{name}"] = writes
        return writes, World(admin, f"failed-{name}")

    try:
        url = await proxy.start()
        with operating(server, url, folder) as process:
            lives.append(process)
            undisturbed = history("undisturbed", Writes())
            await undisturbed[1].live()
            cuts = [Writes(n + 1, how) for how in How for n in range(undisturbed[0].count)]
            histories = [history(str(number), writes) for number, writes in enumerate(cuts)]
            gate = asyncio.Semaphore(AT_A_TIME)
            await asyncio.gather(*(_gated(gate, world.live()) for _, world in histories))
            return [undisturbed, *histories]
    finally:
        await proxy.stop()
        await admin.close()


async def _gated(gate: asyncio.Semaphore, life: Awaitable[World]) -> None:
    async with gate:
        await life


def test_a_death_at_any_write_changes_nothing(bare_server: Bare, tmp_path: Path) -> None:
    histories = asyncio.run(every_history(bare_server, tmp_path))
    reached = [writes.was_cut for writes, _ in histories[1:]]
    # Where others' deaths merge two of its passes, a job has a status write less than undisturbed.
    assert sum(reached) >= 0.8 * len(reached) > 30, histories[0][0].done
    for writes, world in histories:
        status, where = world.final, (world.name, writes.cut, writes.how, writes.done)
        told = [(attempt.number, attempt.outcome) for attempt in status.attempts]
        assert told == [(1, "Failed"), (2, "Succeeded")], where
        assert (status.restarts.failures, status.restarts.disruptions) == (1, 0), where
        assert world.most_alive == 1, where
