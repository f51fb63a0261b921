"""The work queue: each key once, one worker a key, back-off after errors, passes in the future.

``Schedule`` holds the rules and takes the time as an argument; ``Workers`` runs it.
"""

import asyncio
import contextlib
import heapq
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random

from tempflow_operator.decisions.observed import Key
from tempflow_operator.settings import Queue

logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    due: float | None = None
    """When the next pass is due; None when none is."""
    urgent: bool = False
    """Whether that pass goes before all that are not."""
    running_since: float | None = None
    running_urgent: bool = False
    """What the pass in work was; one that fails is so again."""
    not_before: float = 0.0
    errors: int = 0


@dataclass
class Schedule:
    """Which key is due when. Times are seconds on any one clock."""

    settings: Queue
    random: Random = field(default_factory=Random)
    _entries: dict[Key, _Entry] = field(default_factory=dict)
    _heaps: dict[bool, list[tuple[float, Key]]] = field(
        default_factory=lambda: {True: [], False: []}
    )
    """The urgent ones, and the others. What differs from the key's own entry is stale, and is
    skipped."""

    def add(self, key: Key, now: float, *, delay: float = 0.0, urgent: bool = False) -> None:
        """Have a pass after ``delay``, unless an earlier one is due already."""
        entry = self._entries.setdefault(key, _Entry())
        due = max(now + delay, entry.not_before)
        known = (entry.due, entry.urgent)
        entry.due = due if entry.due is None else min(due, entry.due)
        entry.urgent = entry.urgent or urgent
        if (entry.due, entry.urgent) != known and entry.running_since is None:
            self._push(key, entry)

    def _push(self, key: Key, entry: _Entry) -> None:
        if entry.due is not None:
            heapq.heappush(self._heaps[entry.urgent], (entry.due, key))

    def take(self, now: float) -> Key | None:
        """A key whose pass is due; it is not given out again until it is returned."""
        for urgent, heap in self._heaps.items():
            while heap and heap[0][0] <= now:
                due, key = heapq.heappop(heap)
                entry = self._entries.get(key)
                if entry is None or (entry.due, entry.urgent) != (due, urgent):
                    continue
                if entry.running_since is None:
                    entry.due, entry.urgent = None, False
                    entry.running_since, entry.running_urgent = now, urgent
                    return key
        return None

    def done(self, key: Key, now: float, *, again_in: float | None) -> None:
        """The pass ended well."""
        entry = self._returned(key, now)
        entry.errors = 0
        if again_in is not None:
            self.add(key, now, delay=again_in)
        if entry.due is None:
            del self._entries[key]

    def failed(self, key: Key, now: float) -> float:
        """The pass failed; returns the delay before the next. What was asked for meanwhile waits
        too: an error is not cured by another event."""
        entry = self._returned(key, now)
        steady = self.settings.retry_delay * 2.0 ** min(entry.errors, 32)
        delay = min(steady, self.settings.retry_delay_limit) * self.random.uniform(0.8, 1.2)
        entry.errors += 1
        entry.due, entry.not_before = None, now + delay
        self.add(key, now, delay=delay, urgent=entry.running_urgent)
        return delay

    def _returned(self, key: Key, now: float) -> _Entry:
        entry = self._entries[key]
        entry.running_since = None
        entry.not_before = now + self.settings.gap
        if entry.due is not None:
            entry.due = max(entry.due, entry.not_before)
            self._push(key, entry)
        return entry

    def next_due(self) -> float | None:
        """When ``take`` has something to give at the earliest."""
        return min((heap[0][0] for heap in self._heaps.values() if heap), default=None)

    def depth(self, now: float) -> int:
        """Keys that are due or in work."""
        return sum(
            entry.running_since is not None or (entry.due is not None and entry.due <= now)
            for entry in self._entries.values()
        )

    def longest_wait(self, now: float) -> float:
        """How long the key that waits longest has been due or in work."""
        since = (
            entry.due if entry.running_since is None else entry.running_since
            for entry in self._entries.values()
        )
        waits = (now - moment for moment in since if moment is not None)
        return max(0.0, max(waits, default=0.0))


Handler = Callable[[Key], Awaitable[float | None]]
"""Makes a pass; returns after how many seconds to make another, None for not before an event."""


class Workers:
    """Runs the passes that a schedule asks for."""

    def __init__(
        self,
        settings: Queue,
        handler: Handler,
        *,
        clock: Callable[[], float],
        on_error: Callable[[Key, Exception, float], None],
    ) -> None:
        """``on_error`` is told of every failed pass and the delay before the next."""
        self.schedule = Schedule(settings)
        self._settings = settings
        self._handler = handler
        self._clock = clock
        self._on_error = on_error
        self._changed = asyncio.Event()

    def add(self, key: Key, *, delay: float = 0.0, urgent: bool = False) -> None:
        """Ask for a pass after ``delay`` seconds."""
        self.schedule.add(key, self._clock(), delay=delay, urgent=urgent)
        self._changed.set()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._settings.workers):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            key = self.schedule.take(self._clock())
            if key is None:
                await self._wait()
            else:
                await self._pass(key)

    async def _wait(self) -> None:
        due = self.schedule.next_due()
        pause = None if due is None else max(0.0, due - self._clock())
        self._changed.clear()
        with contextlib.suppress(TimeoutError):  # something is due
            await asyncio.wait_for(self._changed.wait(), pause)

    async def _pass(self, key: Key) -> None:
        try:
            again_in = await self._handler(key)
        except Exception as error:
            # The edge: whatever goes wrong in one job's pass is retried and stops no other job.
            delay = self.schedule.failed(key, self._clock())
            self._on_error(key, error, delay)
        else:
            self.schedule.done(key, self._clock(), again_in=again_in)
        self._changed.set()
