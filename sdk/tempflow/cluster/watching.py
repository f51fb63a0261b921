"""A list of objects that is kept up to date: every change once, over any loss of the connection.

The API server forgets its history when it restarts; what was missed meanwhile is found by listing
again and comparing, so a change is never lost, though two of the same object may come as one.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tempflow.cluster.connection import Connection, Raw
from tempflow.cluster.errors import ClusterError, Expired, Silent, Unreachable, refusal

Kind = Literal["added", "changed", "deleted"]

PAGE = "500"
# The server ends a watch after this time, and tells its version about once a minute until then.
# One that says less is asked anew: it may be a connection whose other end is gone.
_WATCH_SECONDS = 240
_IDLE_SECONDS = 90.0
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0


@dataclass
class Patience:
    """How long to go on without an answer, counted from the last one.

    ``give_up_seconds`` None goes on for ever. Forgives what passes: no answer, and a server that
    fails or has too much to do.
    """

    give_up_seconds: float | None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    refused_seconds: float | None = None
    """Less patience with a server that does answer, but not with what is wanted."""
    _since: float | None = field(default=None, init=False)
    _pause: float = field(default=_FIRST_PAUSE_SECONDS, init=False)

    def answered(self) -> None:
        self._since, self._pause = None, _FIRST_PAUSE_SECONDS

    def endure(self, error: ClusterError) -> None:
        """Sleep a while; raises the error instead when it is not one that passes, or too late."""
        if not passes(error):
            raise error
        now = self.clock()
        self._since = now if self._since is None else self._since
        limits = [self.give_up_seconds, self.refused_seconds if error.code else None]
        if any(limit is not None and now - self._since >= limit for limit in limits):
            raise error
        self.sleep(self._pause * random.uniform(0.7, 1.3))  # noqa: S311 - spreads load
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)


def passes(error: ClusterError) -> bool:
    """Whether the same request may succeed later without anybody doing something."""
    return isinstance(error, Unreachable) or error.code == 429 or error.code >= 500


def every(
    connection: Connection, path: str, query: Mapping[str, str], *, what: str
) -> tuple[list[Raw], str]:
    """All objects of a list, page by page, and the version at which they were so."""
    found: list[Raw] = []
    token = ""
    while True:
        page_query = {**query, "limit": PAGE, **({"continue": token} if token else {})}
        page = connection.send("GET", path, what=what, query=page_query)
        found += page.get("items") or []
        token = page["metadata"].get("continue", "")
        if not token:
            return found, str(page["metadata"]["resourceVersion"])


def changes(
    connection: Connection,
    path: str,
    query: Mapping[str, str],
    *,
    what: str,
    give_up_seconds: float | None,
) -> Iterator[tuple[Kind, Raw]]:
    """The objects as they are (``added``), then every change of one; for ever.

    An object is told again only when its version is another. Raises a ClusterError when the server
    refuses, or does not answer for ``give_up_seconds``.
    """
    known: dict[str, Raw] = {}
    begun = False
    patience = Patience(give_up_seconds)
    version = ""
    while True:
        try:
            if not version:
                listed, version = every(connection, path, query, what=what)
                patience.answered()
                begun = True
                yield from _differences(known, listed)
            for kind, raw in _watch(connection, path, query, version, what):
                patience.answered()
                version = str(raw["metadata"]["resourceVersion"])
                if kind is not None:
                    yield from _told(known, kind, raw)
            patience.sleep(_FIRST_PAUSE_SECONDS)  # the server has ended the watch, as it does
        except Expired:
            version = ""
        except Silent:
            patience.answered()
        except ClusterError as error:
            if not begun:
                raise
            patience.endure(error)


def _watch(
    connection: Connection, path: str, query: Mapping[str, str], version: str, what: str
) -> Iterator[tuple[Kind | None, Raw]]:
    """Changes since ``version``; None is a bookmark, which has only a version."""
    watch = {
        **query,
        "watch": "1",
        "resourceVersion": version,
        "allowWatchBookmarks": "true",
        "timeoutSeconds": str(_WATCH_SECONDS),
    }
    with connection.stream(path, watch, what=what, idle_seconds=_IDLE_SECONDS) as lines:
        for line in lines:
            entry: dict[str, Any] = json.loads(line)
            if entry["type"] == "ERROR":
                status = entry["object"]
                raise refusal(int(status.get("code", 500)), status, what=what)
            yield _KINDS.get(entry["type"]), entry["object"]


_KINDS: dict[str, Kind] = {"ADDED": "added", "MODIFIED": "changed", "DELETED": "deleted"}


def _told(known: dict[str, Raw], kind: Kind, raw: Raw) -> Iterator[tuple[Kind, Raw]]:
    uid = raw["metadata"]["uid"]
    before = known.get(uid)
    if kind == "deleted":
        known.pop(uid, None)
        yield kind, raw
    elif before is None or _version(before) != _version(raw):
        known[uid] = raw
        yield ("added" if before is None else "changed"), raw


def _differences(known: dict[str, Raw], listed: list[Raw]) -> Iterator[tuple[Kind, Raw]]:
    """What a new list says that was not known; and ``known`` is brought up to it."""
    now = {raw["metadata"]["uid"]: raw for raw in listed}
    for uid in [uid for uid in known if uid not in now]:
        yield "deleted", known.pop(uid)
    for raw in listed:
        yield from _told(known, "changed", raw)


def _version(raw: Raw) -> str:
    return str(raw["metadata"]["resourceVersion"])
