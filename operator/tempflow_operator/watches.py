"""The watches on jobs, gangs and pods: the only file that knows kopf.

kopf keeps streams alive, lists anew after a gap, and filters by label on the server. It is used for
nothing else: its handlers name the job that an event concerns, and nothing is ever retried, stored
or annotated by it.

kopf takes every task of its event loop for its own and cancels them all when it ends, so it gets a
loop, and with it a thread, of its own. A stop then does not have to wait for it either.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import kopf

from tempflow_api import naming
from tempflow_api.termination import LastWords
from tempflow_operator.decisions.observed import last_words

Hear = Callable[[str, str, LastWords], None]
"""Namespace, UID of the job that a pod belongs to, and what its ended trainer left behind."""
Saw = Callable[[str, str, str, str], None]
"""Kind, namespace, resource version, and name of the job concerned (empty when unknown)."""


class Watches:
    """Tells of every event, in the event loop that runs it."""

    def __init__(self, namespaces: Sequence[str], saw: Saw, hear: Hear) -> None:
        """No ``namespaces`` means the whole cluster."""
        self._hear = hear
        self._namespaces = namespaces
        self._saw = saw
        self._stop = threading.Event()

    async def run(self) -> None:
        """Until cancelled; an error of kopf ends it too."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def end(error: BaseException | None) -> None:
            if not ended.done():
                ended.set_exception(error or RuntimeError("kopf ended by itself"))

        def watch() -> None:
            error: BaseException | None = None
            try:
                asyncio.run(self._operator(loop))
            except BaseException as raised:  # the edge of the thread: all of it goes to the loop
                error = raised
            if not self._stop.is_set():
                loop.call_soon_threadsafe(end, error)

        threading.Thread(target=watch, name="watches", daemon=True).start()
        try:
            await ended
        finally:
            self._stop.set()

    async def _operator(self, loop: asyncio.AbstractEventLoop) -> None:
        await kopf.operator(
            registry=self._registry(loop),
            settings=settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._stop,
        )

    def _registry(self, loop: asyncio.AbstractEventLoop) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)
        async def _(**kwargs: Any) -> kopf.ConnectionInfo | None:
            return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

        def pass_on(kind: str, metadata: kopf.Meta, job: str) -> None:
            version = metadata.get("resourceVersion", "")
            loop.call_soon_threadsafe(self._saw, kind, metadata["namespace"], version, job)

        known = Known()

        @kopf.on.event(naming.GROUP, naming.VERSION, naming.PLURAL, registry=registry)
        async def _(meta: kopf.Meta, **event: Any) -> None:
            concerned = known.concerned_by(event["type"], meta)
            pass_on(naming.PLURAL, meta, meta["name"] if concerned else "")

        @kopf.on.event("batch", "v1", "jobs", registry=registry)
        async def _(meta: kopf.Meta, **_: Any) -> None:
            pass_on("jobs", meta, meta.labels.get(naming.LABEL_JOB_NAME, ""))

        @kopf.on.event("", "v1", "pods", registry=registry)
        async def _(meta: kopf.Meta, body: kopf.Body, **_: Any) -> None:
            words = last_words(body)
            if words is not None:
                uid = meta.labels.get(naming.LABEL_JOB_UID, "")
                loop.call_soon_threadsafe(self._hear, meta["namespace"], uid, words)
            pass_on("pods", meta, meta.labels.get(naming.LABEL_JOB_NAME, ""))

        return registry


class Known:
    """What the watch has told of each job, so that a write of status, which is the operator's own,
    asks for no pass. A status that somebody else has changed is found by the list of all jobs."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, bool]] = {}

    def concerned_by(self, event: str | None, metadata: Mapping[str, Any]) -> bool:
        """Whether more has happened to the job than that its status was written. A list, which
        has no ``event``, stands for whatever was missed."""
        uid = metadata["uid"]
        if event == "DELETED":
            self._told.pop(uid, None)
            return True
        now = (metadata.get("generation", 0), "deletionTimestamp" in metadata)
        before, self._told[uid] = self._told.get(uid), now
        return event is None or before != now


class _NoEssence(kopf.DiffBaseStorage):
    """kopf copies every object that it hears of, to tell what has changed; nobody asks for that
    here, and with hundreds of pods it was a third of what the operator did."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass


def settings() -> kopf.OperatorSettings:
    """kopf writes nothing, looks at nothing but the three kinds, and gives up on dead streams."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.peering.standalone = True
    for kind in ("jobs", "pods"):
        # By the server: a cluster has far more pods than ours.
        settings.watching.label_selectors[kind] = naming.LABEL_JOB_UID
    # Of a list, so many objects are in memory at a time; and kopf keeps an object as long as it
    # waits for the next event of it. With 4,000 pods this took half of the operator's memory.
    settings.watching.chunk_size = 100
    settings.queueing.idle_timeout = 0.1
    settings.watching.server_timeout = 600
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.persistence.diffbase_storage = _NoEssence()
    settings.persistence.finalizer = f"{naming.GROUP}/kopf"
    settings.process.ultimate_exiting_timeout = None  # the process ends as main says
    # Signals are main's business, which kopf warns about.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
    return settings
