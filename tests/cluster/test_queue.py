"""A queue that holds an attempt back, takes it back while it runs, and admits it again.

The queue is a stand-in that does what Kueue does to a Job: it sets ``spec.suspend``. API server and
Job controller are real; the pods are bound to a node, so that they stop as slowly as real ones.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from tempflow_api import naming
from tempflow_api.conditions import ConditionType, Reason, find
from tempflow_api.errors import ExitCode
from tempflow_api.status import JobStatus
from tempflow_operator.cluster import JOBS, PODS, Cluster
from tempflow_operator.decisions.observed import Key
from tempflow_operator.metrics import Metrics
from tests.builders import Raw, make_job
from tests.cluster.bare import Bare
from tests.cluster.lives import (
    NAMESPACE,
    bind,
    connect,
    connect_operator,
    operator,
    patch,
    phase_of,
    pods_of,
    set_pod,
    status_of,
    submit,
)

pytestmark = pytest.mark.cluster

NODES = 2
# Shorter than the time in the queue, longer than pods take to start.
DEADLINE_SECONDS = 4
IN_QUEUE_SECONDS = 6.0


class Place:
    """One job, its queue and its kubelet."""

    def __init__(self, admin: Cluster, acting: Cluster, name: str) -> None:
        self.admin, self.name = admin, name
        self.passes = operator(acting)
        self.gang = naming.attempt_name(name, 1)

    async def status(self) -> JobStatus:
        return await status_of(self.admin, self.name)

    async def running(self) -> str:
        condition = find((await self.status()).conditions, ConditionType.RUNNING)
        return condition.reason if condition is not None else ""

    async def pods(self) -> list[Raw]:
        return await pods_of(self.admin, self.name)

    async def admit(self, admitted: bool) -> None:
        await patch(self.admin, JOBS, self.gang, {"spec": {"suspend": not admitted}})

    async def until(self, what: str, there: Callable[[], Awaitable[bool]]) -> None:
        """Passes go on until it is so."""
        started = time.monotonic()
        while not await there():
            assert time.monotonic() - started < 40, (what, await self.status())
            await self.passes.run_pass(Key(NAMESPACE, self.name))
            await asyncio.sleep(0.1)

    async def reason_is(self, reason: Reason) -> None:
        async def there() -> bool:
            return await self.running() == reason

        await self.until(reason, there)

    async def start_pods(self) -> None:
        async def created() -> bool:
            return len([pod for pod in await self.pods() if phase_of(pod) == "Pending"]) == NODES

        await self.until("pods", created)
        for pod in await self.pods():
            if phase_of(pod) != "Pending":
                continue
            await bind(self.admin, pod)
            await set_pod(self.admin, pod, "Running", {"running": {}})
        await self.reason_is(Reason.PODS_RUNNING)

    async def stop_pods(self) -> None:
        """As a kubelet does: the container ends with its own code, and then the pod goes."""

        async def asked() -> bool:
            pods = await self.pods()
            return bool(pods) and all("deletionTimestamp" in pod["metadata"] for pod in pods)

        await self.until("pods are asked to stop", asked)
        for pod in await self.pods():
            await set_pod(
                self.admin, pod, "Failed", {"terminated": {"exitCode": int(ExitCode.PREEMPTED)}}
            )
        await asyncio.sleep(2)  # the Job controller looks at what has failed
        for pod in await self.pods():
            await self.admin._send(
                "delete",
                PODS,
                NAMESPACE,
                name=pod["metadata"]["name"],
                body={"gracePeriodSeconds": 0},
            )


async def story(server: Bare) -> JobStatus:
    acting = Cluster(connect_operator(server), Metrics())
    place = Place(Cluster(connect(server), Metrics()), acting, "queued")
    try:
        job = make_job(place.name).nodes(NODES).spec("runPolicy.queue", "research")
        job.spec("runPolicy.preRunningDeadlineSeconds", DEADLINE_SECONDS).max_restarts(0)
        await submit(place.admin, job)
        for _ in range(2):
            await place.reason_is(Reason.QUEUED)
            await asyncio.sleep(IN_QUEUE_SECONDS)
            await place.admit(True)
            await place.start_pods()
            await place.admit(False)
            await place.stop_pods()
        await place.reason_is(Reason.QUEUED)
        await place.admit(True)
        await place.start_pods()
        for pod in await place.pods():
            await set_pod(place.admin, pod, "Succeeded", {"terminated": {"exitCode": 0}})
        await place.reason_is(Reason.COMPLETED)
        return await place.status()
    finally:
        await place.admin.close()
        await acting.close()


def test_a_queue_takes_an_attempt_back_twice_and_nothing_is_spent(bare_server: Bare) -> None:
    status = asyncio.run(story(bare_server))
    assert status.phase == "Succeeded"
    assert [(attempt.number, attempt.outcome) for attempt in status.attempts] == [(1, "Succeeded")]
    restarts = status.restarts
    assert (restarts.failures, restarts.disruptions, restarts.preflights) == (0, 0, 0)
