"""A suspension: the operator dies after any of its calls, and another one goes on.

Against a real API server and the real Job controller; the test is the kubelet. A death between two
reads leaves what the last write left, so the cut points are all writes: each is carried out, its
answer is lost, and with it everything that the operator remembers.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import pytest
from kubernetes.aio.client import ApiClient

from tempflow_api.conditions import ConditionType, is_true
from tempflow_api.status import JobStatus
from tempflow_operator.cluster import TRAINING_JOBS, ApiError, Cluster
from tempflow_operator.decisions.observed import Key
from tempflow_operator.metrics import Metrics
from tempflow_operator.reconcile import Obstructed
from tests.builders import Raw, make_job
from tests.cluster.bare import Bare
from tests.cluster.lives import (
    NAMESPACE,
    connect,
    operator,
    patch,
    phase_of,
    set_pod,
    status_of,
    submit,
    what_lives,
)

pytestmark = pytest.mark.cluster

NODES = 2
DEADLINE_SECONDS = 90.0
AT_A_TIME = 6
_WRITES = frozenset({"create", "update", "patch", "delete"})


class Dead(Exception):
    """The operator's process has ended."""


class Mortal(Cluster):
    """The calls of an operator that dies when it has made so many writes; None: never."""

    def __init__(self, api: ApiClient, dies_after: int | None) -> None:
        super().__init__(api, Metrics())
        self.dies_after = dies_after
        self.writes = 0

    async def _send(self, verb: str, *arguments: Any, **keywords: Any) -> Raw:
        try:
            return await super()._send(verb, *arguments, **keywords)
        finally:
            self.writes += verb in _WRITES
            if self.writes == self.dies_after:
                raise Dead


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
        """Pods start; then the first attempt is suspended, and the other one succeeds."""
        living, attempts = await what_lives(self.admin, self.name)
        self.most_alive = max(self.most_alive, len(attempts))
        if attempts == {"1"} and all(phase_of(p) == "Running" for p in living):
            if len(living) == NODES:
                await self._set_suspended(True)
            await self._move(living, may_end=False)
            return
        if is_true((await self.status()).conditions, ConditionType.SUSPENDED):
            await self._set_suspended(False)
        await self._move(living, may_end=True)

    async def _move(self, living: list[Raw], *, may_end: bool) -> None:
        all_run = len(living) == NODES and all(phase_of(pod) == "Running" for pod in living)
        for pod in living:
            if phase_of(pod) == "Pending":
                await set_pod(self.admin, pod, "Running", {"running": {}})
            elif all_run and may_end:
                await set_pod(self.admin, pod, "Succeeded", {"terminated": {"exitCode": 0}})

    async def _set_suspended(self, suspended: bool) -> None:
        body = {"spec": {"runPolicy": {"suspend": suspended}}}
        await patch(self.admin, TRAINING_JOBS, self.name, body)


async def live(api: ApiClient, world: World, dies_after: int | None) -> int:
    """A job from start to end, with one death on the way; returns the writes of the first
    operator."""
    key = Key(NAMESPACE, world.name)
    mortal = Mortal(api, dies_after)
    acting = operator(mortal)
    served = [{"name": "digit", "placement": "service"}]
    await submit(world.admin, make_job(world.name).nodes(NODES).spec("rewards", served))
    started = time.monotonic()
    while not is_true((await world.status()).conditions, ConditionType.FINISHED):
        assert time.monotonic() - started < DEADLINE_SECONDS, (dies_after, await world.status())
        try:
            await acting.run_pass(key)
        except Dead:
            acting = operator(Mortal(api, None))
        except (Obstructed, ApiError):
            pass  # tried again, as the work queue does
        await world.turn()
        await asyncio.sleep(0.05)
    return mortal.writes


async def every_history(server: Bare) -> list[tuple[int | None, World]]:
    api = connect(server)
    admin = Cluster(api, Metrics())
    serial = itertools.count()

    def world() -> World:
        return World(admin, f"suspended-{next(serial)}")

    try:
        undisturbed = world()
        writes = await live(api, undisturbed, None)
        histories: list[tuple[int | None, World]] = [(None, undisturbed)]
        histories += [(cut, world()) for cut in range(1, writes + 1)]
        gate = asyncio.Semaphore(AT_A_TIME)
        await asyncio.gather(*(_gated(gate, live(api, w, cut)) for cut, w in histories[1:]))
        for _, lived in histories:
            lived.final = await lived.status()
        return histories
    finally:
        await admin.close()


async def _gated(gate: asyncio.Semaphore, run: Awaitable[int]) -> int:
    async with gate:
        return await run


def test_a_death_after_any_write_of_a_suspension_changes_nothing(bare_server: Bare) -> None:
    histories = asyncio.run(every_history(bare_server))
    assert len(histories) > 12, "there are as many cut points as writes"
    for cut, world in histories:
        status = world.final
        told = [(attempt.number, attempt.outcome) for attempt in status.attempts]
        assert told == [(1, "Suspended"), (2, "Succeeded")], cut
        assert (status.restarts.failures, status.restarts.disruptions) == (0, 0), cut
        assert world.most_alive == 1, cut
