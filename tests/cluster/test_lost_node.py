"""A pod that stays Terminating because its node is gone, against the real Job controller.

The pod was the only one of its attempt: no peer fails of its loss, and the Job controller waits for
its end. The operator does not; what the old pod might still write, the checkpoint store fences.
"""

import asyncio
import time

import pytest

from tempflow_operator import settings as configuration
from tempflow_operator.cluster import PODS, Cluster
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

NAME = "lost"
PATIENCE_SECONDS = 2.0
GRACE_SECONDS = 15
SETTINGS = configuration.Settings(
    timing=configuration.Timing(disruption_delay=0.1, lost_node=PATIENCE_SECONDS)
)


async def evict(admin: Cluster, pod: Raw) -> None:
    """As the taint manager does when a node does not answer."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    condition |= {"message": "node is unreachable", "lastTransitionTime": "2026-01-31T12:00:00Z"}
    conditions = [*pod["status"].get("conditions", []), condition]
    name = pod["metadata"]["name"]
    await patch(admin, PODS, name, {"status": {"conditions": conditions}}, subresource="status")
    await admin._send("delete", PODS, NAMESPACE, name=name, body={})


async def story(server: Bare) -> float:
    """Returns how long after the eviction the next attempt had a pod."""
    admin = Cluster(connect(server), Metrics())
    acting = Cluster(connect_operator(server), Metrics())
    try:
        passes = operator(acting, SETTINGS)
        job = make_job(NAME).nodes(1)
        await submit(admin, job.spec("runPolicy.terminationGracePeriodSeconds", GRACE_SECONDS))
        evicted_at = 0.0
        started = time.monotonic()
        while time.monotonic() - started < 60:
            await passes.run_pass(Key(NAMESPACE, NAME))
            pods = await pods_of(admin, NAME)
            for pod in pods:
                if not evicted_at and phase_of(pod) == "Pending":
                    await bind(admin, pod)
                    await set_pod(admin, pod, "Running", {"running": {}})
                elif not evicted_at:
                    await evict(admin, pod)
                    evicted_at = time.monotonic()
            if len(pods) == 2:
                return time.monotonic() - evicted_at
            await asyncio.sleep(0.2)
        raise AssertionError(await status_of(admin, NAME))
    finally:
        await admin.close()
        await acting.close()


async def attempts(server: Bare) -> list[tuple[int, str]]:
    admin = Cluster(connect(server), Metrics())
    try:
        status = await status_of(admin, NAME)
        return [(attempt.number, attempt.outcome) for attempt in status.attempts]
    finally:
        await admin.close()


def test_the_next_attempt_starts_after_a_stated_time(bare_server: Bare) -> None:
    waited = asyncio.run(story(bare_server))
    assert GRACE_SECONDS + PATIENCE_SECONDS - 1 <= waited <= GRACE_SECONDS + PATIENCE_SECONDS + 10
    assert asyncio.run(attempts(bare_server)) == [(1, "Disrupted"), (2, "Active")]
