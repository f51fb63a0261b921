"""Leader election by a Lease: one replica acts, the others wait.

A replica measures by its own clock how long the Lease has not changed, never by the times that
stand in it, so that clocks may differ. A leader that cannot renew stops before the Lease is free.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from tempflow_operator.cluster import ApiError
from tempflow_operator.decisions import instants
from tempflow_operator.settings import Lease

logger = logging.getLogger(__name__)

Raw = dict[str, Any]


class LeaseStore(Protocol):
    """Where the Lease lies."""

    async def lease(self, namespace: str, name: str) -> Raw | None: ...

    async def create_lease(self, namespace: str, body: Raw) -> Raw: ...

    async def replace_lease(self, namespace: str, name: str, body: Raw) -> Raw: ...


class LeadershipLost(Exception):
    """Another replica may act from now on: stop at once."""


@dataclass
class _Seen:
    """The Lease as it was when it last changed, and when that was."""

    version: str = ""
    at: float = 0.0


class Leader:
    """This replica's part in the election."""

    def __init__(
        self,
        store: LeaseStore,
        settings: Lease,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._wall_clock = wall_clock
        self._seen = _Seen()
        self._held: Raw | None = None

    async def acquire(self) -> None:
        """Returns once this replica leads."""
        while not await self._attempt(self._try_acquire):
            await asyncio.sleep(self._settings.retry)
        logger.info("leading as %s", self._settings.identity)

    async def hold(self) -> None:
        """Renews until cancelled; LeadershipLost when that has failed for too long."""
        renewed = self._clock()
        while True:
            await asyncio.sleep(self._settings.retry)
            left = renewed + self._settings.renew_deadline - self._clock()
            started = self._clock()
            try:
                async with asyncio.timeout(max(0.0, left)):
                    if await self._attempt(self._try_renew):
                        renewed = started
                        continue
            except TimeoutError:
                pass
            if self._clock() - renewed >= self._settings.renew_deadline:
                raise LeadershipLost(f"not renewed for {self._settings.renew_deadline:.0f} s")

    async def release(self) -> None:
        """Leave the Lease to whoever looks next, instead of letting it run out."""
        if self._held is None:
            return
        held, self._held = self._held, None
        spec = {**held["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
        spec["renewTime"] = instants.micro_timestamp(self._wall_clock())
        await self._attempt(lambda: self._replace({**held, "spec": spec}))

    async def _attempt(self, step: Callable[[], Any]) -> bool:
        try:
            return bool(await step())
        except ApiError as error:
            if error.code != 409:  # 409: another one was faster
                logger.warning("lease: %s", error)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.warning("lease: %s: %s", type(error).__name__, error)
        return False

    async def _try_acquire(self) -> bool:
        lease = await self._store.lease(self._settings.namespace, self._settings.name)
        if lease is None:
            body = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self._settings.name, "namespace": self._settings.namespace},
                "spec": self._spec({}),
            }
            self._held = await self._store.create_lease(self._settings.namespace, body)
            return True
        if not self._free(lease):
            return False
        return await self._replace({**lease, "spec": self._spec(lease.get("spec") or {})})

    def _free(self, lease: Raw) -> bool:
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen.version:
            self._seen = _Seen(version, self._clock())
        if holder in ("", self._settings.identity):
            return True
        patience = spec.get("leaseDurationSeconds") or self._settings.duration
        return self._clock() - self._seen.at >= patience

    async def _try_renew(self) -> bool:
        held = self._held
        if held is None:
            return False
        spec = {**held["spec"], "renewTime": instants.micro_timestamp(self._wall_clock())}
        try:
            return await self._replace({**held, "spec": spec})
        except ApiError as error:
            if error.code == 409:
                await self._read_again()
            raise

    async def _read_again(self) -> None:
        """After a conflict: an answer to an earlier renewal may have been lost, or we have been
        overtaken, which ends it at once."""
        lease = await self._store.lease(self._settings.namespace, self._settings.name)
        holder = (lease or {}).get("spec", {}).get("holderIdentity")
        if lease is None or holder != self._settings.identity:
            self._held = None
            raise LeadershipLost(f"the Lease is held by {holder or 'nobody'}")
        self._held = lease

    async def _replace(self, body: Raw) -> bool:
        settings = self._settings
        answer = await self._store.replace_lease(settings.namespace, settings.name, body)
        ours = body["spec"]["holderIdentity"] == settings.identity
        self._held = answer if ours else None
        return True

    def _spec(self, old: Raw) -> Raw:
        now = instants.micro_timestamp(self._wall_clock())
        return {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": max(1, round(self._settings.duration)),
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": (old.get("leaseTransitions") or 0) + 1,
        }
