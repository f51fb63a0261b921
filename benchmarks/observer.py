"""What happens on a control plane and when, as two watches tell it, and requests that cause it."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from tempflow_api import naming
from tempflow_api.conditions import ConditionType, is_true
from tempflow_api.status import JobStatus
from tempflow_operator.cluster import CONFIG_MAPS, JOBS, PODS, SERVICES, TRAINING_JOBS, Resource
from tests.cluster.bare import Bare

NAMESPACE = "default"
# As kubectl prints them: a tenth of what a pod's own JSON would take to read.
_AS_TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
_NAME, _STATUS, _ADDRESS = 0, 2, 5
_LONGEST_LINE = 2**20
_AT_A_TIME = 16

Raw = dict[str, Any]


class Refused(Exception):
    """The API server did not do what the benchmark needs."""


class Observer:
    """Times are seconds of ``time.monotonic``."""

    def __init__(self, server: Bare) -> None:
        self._session = aiohttp.ClientSession(
            server.url,
            headers={"Authorization": f"Bearer {server.token}"},
            connector=aiohttp.TCPConnector(ssl=False, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_LONGEST_LINE,
        )
        self.pods_running: dict[str, float] = {}
        """By pod."""
        self.addresses: dict[str, str] = {}
        """By pod."""
        self.said_running: dict[str, float] = {}
        """By job: when its status first said that it runs."""
        self.generations: dict[str, dict[int, float]] = {}
        """By job and generation: when its status first knew of it."""
        self.uids: dict[str, str] = {}
        """By job."""

    async def __aenter__(self) -> "Observer":
        watches = (self._watch_pods, self._watch_jobs)
        self._tasks = [asyncio.create_task(watch()) for watch in watches]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome

    def forget(self) -> None:
        """What was seen so far; the watches go on."""
        for seen in (self.pods_running, self.addresses, self.said_running, self.generations):
            seen.clear()
        self.uids.clear()

    async def create(self, resource: Resource, bodies: list[Raw]) -> None:
        """All of them, some at a time, as a client in a hurry would."""
        gate = asyncio.Semaphore(_AT_A_TIME)

        async def one(body: Raw) -> None:
            async with gate:
                await self._ask("POST", resource.path(NAMESPACE), body=body)

        await asyncio.gather(*(one(body) for body in bodies))

    async def change(self, resource: Resource, name: str, body: Raw) -> Raw:
        """Merge into one object; the object as it is afterwards."""
        return await self._ask(
            "PATCH",
            resource.path(NAMESPACE, name),
            body=body,
            content_type="application/merge-patch+json",
        )

    async def clear(self) -> None:
        """Delete all jobs, and wait until nothing is left of them."""
        for resource in (TRAINING_JOBS, JOBS):
            body = {"propagationPolicy": "Background"}
            await self._ask("DELETE", resource.path(NAMESPACE), body=body)
        for resource in (TRAINING_JOBS, JOBS, PODS, CONFIG_MAPS, SERVICES):
            while await self._left(resource):
                await asyncio.sleep(0.5)
        self.forget()

    async def _left(self, resource: Resource) -> bool:
        query = {"labelSelector": naming.LABEL_JOB_UID, "limit": "1"}
        if resource is TRAINING_JOBS:
            del query["labelSelector"]
        return bool((await self._ask("GET", resource.path(NAMESPACE), query=query))["items"])

    async def _watch_pods(self) -> None:
        async for event in self._watch(PODS, accept=_AS_TABLE, includeObject="None"):
            for row in event["object"].get("rows") or []:
                cells = row["cells"]
                if cells[_STATUS] == "Running":
                    self.pods_running.setdefault(cells[_NAME], time.monotonic())
                    self.addresses[cells[_NAME]] = cells[_ADDRESS]

    async def _watch_jobs(self) -> None:
        async for event in self._watch(TRAINING_JOBS):
            metadata = event["object"]["metadata"]
            name = metadata["name"]
            self.uids[name] = metadata["uid"]
            status = JobStatus.model_validate(event["object"].get("status") or {})
            known = self.generations.setdefault(name, {})
            known.setdefault(status.observed_generation, time.monotonic())
            if is_true(status.conditions, ConditionType.RUNNING):
                self.said_running.setdefault(name, time.monotonic())

    async def _watch(
        self, resource: Resource, *, accept: str = "application/json", **query: str
    ) -> AsyncIterator[Raw]:
        """What is there, and what changes; from the beginning again when the server ends it."""
        while True:
            async for event in self._watch_once(resource, accept, query):
                if event["type"] != "DELETED":
                    yield event

    async def _watch_once(
        self, resource: Resource, accept: str, query: dict[str, str]
    ) -> AsyncIterator[Raw]:
        query = {**query, "watch": "1", "timeoutSeconds": "86400"}
        path, headers = resource.path(NAMESPACE), {"Accept": accept}
        async with self._session.get(path, params=query, headers=headers) as answer:
            if answer.status != 200:
                raise Refused(f"watch of {resource.plural}: {answer.status} {await answer.text()}")
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise Refused(f"watch of {resource.plural}: {event['object']}")
                yield event

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        body: Raw | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Raw:
        headers = {"Content-Type": content_type}
        async with self._session.request(
            method, path, json=body, params=query, headers=headers
        ) as answer:
            told: Raw = await answer.json()
            if answer.status >= 400:
                raise Refused(f"{method} {path}: {answer.status} {told.get('message')}")
            return told

    async def until(self, what: str, condition: Any, *, deadline_seconds: float) -> None:
        """Look often, until it is so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                while not condition():
                    for task in self._tasks:
                        if task.done():
                            task.result()
                    await asyncio.sleep(0.02)
                return
        raise Refused(f"{what}: not so after {deadline_seconds:.0f} s")
