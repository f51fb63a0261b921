"""What the liveness probe of a whole replica says, with everything but the API server real."""

import asyncio
from typing import cast

from tempflow_api import naming
from tempflow_operator.cluster import Cluster, Observation
from tempflow_operator.decisions.observed import Key
from tempflow_operator.main import Operator
from tempflow_operator.metrics import Metrics
from tempflow_operator.settings import Settings
from tests.builders import make_job, seen

SETTINGS = Settings()
KEY = Key("team", "demo")


class ReadOnly:
    """The cluster, with one job that another manager cares for. Any write is an error here."""

    async def observe(self, key: Key) -> Observation:
        job = make_job().spec("managedBy", "kueue.x-k8s.io/multikueue").typed()
        return Observation(job, seen(), {"pods": 7, "jobs": 0, naming.PLURAL: 7})


class Replica:
    """One under a clock that the test turns."""

    def __init__(self, *, leading: bool = True) -> None:
        self.now = 0.0
        cluster = cast(Cluster, ReadOnly())
        self.operator = Operator(SETTINGS, cluster, Metrics(), clock=lambda: self.now)
        self.operator._leading = leading

    def hears(self, kind: str, version: int) -> None:
        self.operator._saw(kind, KEY.namespace, str(version), "")

    def makes_a_pass(self) -> None:
        """What the workers would do with the key."""
        with asyncio.Runner() as runner:
            runner.run(self._pass())

    async def _pass(self) -> None:
        assert await self.operator._workers._handler(KEY) is None

    def after(self, seconds: float) -> str:
        self.now += seconds
        return self.operator.what_is_wrong()


def test_a_pass_that_never_ends_is_told() -> None:
    replica = Replica()
    replica.operator._workers.add(KEY)
    assert replica.after(SETTINGS.health.queue_stuck) == ""
    assert replica.after(1) == "a job waits for its pass for 181 s"


def test_a_watch_that_went_silent_is_told() -> None:
    replica = Replica()
    replica.hears(naming.PLURAL, 7)
    replica.makes_a_pass()
    assert replica.after(SETTINGS.health.watch_stuck) == ""
    assert "a watch is" in replica.after(1)
    replica.hears("pods", 7)
    assert replica.after(0) == ""


def test_a_replica_that_waits_for_the_lease_has_nothing_to_prove() -> None:
    replica = Replica(leading=False)
    replica.operator._workers.add(KEY)
    replica.makes_a_pass()
    assert replica.after(10_000) == ""


def test_another_managers_job_is_not_touched() -> None:
    Replica().makes_a_pass()
