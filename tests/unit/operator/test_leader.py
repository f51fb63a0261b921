"""Leader election. The Lease lies in a store that conflicts like the API server's."""

import asyncio
import copy
from typing import Any

import pytest

from tempflow_operator.cluster import ApiError
from tempflow_operator.leader import Leader, LeadershipLost
from tempflow_operator.settings import Lease
from tests.unit.operator.virtual_time import now, run

Raw = dict[str, Any]


class Store:
    """One Lease, versions, conflicts; ``down`` fails every call."""

    def __init__(self) -> None:
        self.stored: Raw | None = None
        self.version = 0
        self.down = False
        self.lose_answers = False

    async def lease(self, namespace: str, name: str) -> Raw | None:
        self._check()
        return copy.deepcopy(self.stored)

    async def create_lease(self, namespace: str, body: Raw) -> Raw:
        self._check()
        if self.stored is not None:
            raise ApiError("create", 409, "AlreadyExists", "")
        return self._store(body)

    async def replace_lease(self, namespace: str, name: str, body: Raw) -> Raw:
        self._check()
        assert self.stored is not None
        if body["metadata"]["resourceVersion"] != self.stored["metadata"]["resourceVersion"]:
            raise ApiError("update", 409, "Conflict", "")
        return self._store(body)

    def _check(self) -> None:
        if self.down:
            raise OSError("no route to host")

    def _store(self, body: Raw) -> Raw:
        self.version += 1
        self.stored = copy.deepcopy(body)
        self.stored["metadata"]["resourceVersion"] = str(self.version)
        if self.lose_answers:
            raise TimeoutError
        return copy.deepcopy(self.stored)

    @property
    def holder(self) -> str:
        assert self.stored is not None
        return str(self.stored["spec"]["holderIdentity"])


def leader(store: Store, identity: str) -> Leader:
    """With the operator's own times, under a clock that jumps."""
    return Leader(store, Lease(identity=identity), clock=now)


def test_the_first_one_leads() -> None:
    async def story() -> None:
        store = Store()
        await leader(store, "a").acquire()
        assert store.holder == "a"

    run(story)


def test_the_second_waits_until_the_lease_is_released() -> None:
    async def story() -> None:
        store = Store()
        first = leader(store, "a")
        await first.acquire()
        second = asyncio.create_task(leader(store, "b").acquire())
        await asyncio.sleep(10)
        assert not second.done()
        await first.release()
        start = now()
        await second
        assert now() - start <= Lease.retry
        assert store.holder == "b"
        assert store.stored is not None
        assert store.stored["spec"]["leaseTransitions"] == 2

    run(story)


def test_a_dead_leaders_lease_runs_out() -> None:
    async def story() -> None:
        store = Store()
        await leader(store, "a").acquire()
        start = now()
        await leader(store, "b").acquire()
        assert Lease.duration <= now() - start <= Lease.duration + Lease.retry
        assert store.holder == "b"

    run(story)


def test_a_renewed_lease_does_not_run_out() -> None:
    async def story() -> None:
        store = Store()
        first = leader(store, "a")
        await first.acquire()
        holding = asyncio.create_task(first.hold())
        second = asyncio.create_task(leader(store, "b").acquire())
        await asyncio.sleep(600)
        assert not second.done()
        assert not holding.done()
        second.cancel()
        holding.cancel()

    run(story)


def test_times_in_the_lease_do_not_matter() -> None:
    """The holder's clock may be wrong by years; what counts is that the Lease changes."""

    async def story() -> None:
        store = Store()
        await leader(store, "a").acquire()
        assert store.stored is not None
        store.stored["spec"]["renewTime"] = "1999-01-01T00:00:00.000000Z"
        second = asyncio.create_task(leader(store, "b").acquire())
        await asyncio.sleep(Lease.duration - 1)
        assert not second.done()
        second.cancel()

    run(story)


def test_a_leader_that_cannot_renew_gives_up_before_the_lease_runs_out() -> None:
    async def story() -> None:
        store = Store()
        first = leader(store, "a")
        await first.acquire()
        store.down = True
        start = now()
        with pytest.raises(LeadershipLost):
            await first.hold()
        assert now() - start < Lease.duration

    run(story)


def test_a_short_outage_is_survived() -> None:
    async def story() -> None:
        store = Store()
        first = leader(store, "a")
        await first.acquire()
        holding = asyncio.create_task(first.hold())
        store.down = True
        await asyncio.sleep(Lease.renew_deadline - 2 * Lease.retry)
        store.down = False
        await asyncio.sleep(60)
        assert not holding.done()
        holding.cancel()

    run(story)


def test_an_overtaken_leader_stops_at_once() -> None:
    async def story() -> None:
        store = Store()
        first = leader(store, "a")
        await first.acquire()
        assert store.stored is not None
        stolen = {**store.stored, "spec": {**store.stored["spec"], "holderIdentity": "b"}}
        await store.replace_lease("", "", stolen)
        with pytest.raises(LeadershipLost, match="held by b"):
            await first.hold()
        await first.release()
        assert store.holder == "b"

    run(story)


def test_a_renewal_whose_answer_was_lost_is_no_loss() -> None:
    async def story() -> None:
        store = Store()
        first = leader(store, "a")
        await first.acquire()
        holding = asyncio.create_task(first.hold())
        store.lose_answers = True
        await asyncio.sleep(2 * Lease.retry)
        store.lose_answers = False
        await asyncio.sleep(60)
        assert not holding.done()
        assert store.version > 3
        holding.cancel()

    run(story)


def test_a_restarted_replica_takes_its_own_lease_at_once() -> None:
    async def story() -> None:
        store = Store()
        await leader(store, "a").acquire()
        await leader(store, "a").acquire()
        assert store.holder == "a"

    run(story)


def test_of_two_that_try_at_once_one_leads() -> None:
    async def story() -> None:
        store = Store()
        tries = [asyncio.create_task(leader(store, name).acquire()) for name in ("a", "b")]
        done, pending = await asyncio.wait(tries, timeout=5)
        assert (len(done), len(pending)) == (1, 1)
        for task in pending:
            task.cancel()

    run(story)


def test_releasing_what_was_never_held_does_nothing() -> None:
    async def story() -> None:
        store = Store()
        await leader(store, "a").release()
        assert store.stored is None

    run(story)
