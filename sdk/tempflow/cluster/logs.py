"""What the ranks of a job wrote, merged by time.

A kubelet gives a log with a time, to the nanosecond, before each line. That time and the number of
lines that had it are the place to go on from after a connection was lost: no line is lost and none
is told twice. What a kubelet has rotated away cannot be read any more.
"""

import heapq
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from tempflow.cluster.connection import PODS, Connection, Raw
from tempflow.cluster.errors import ClusterError, Invalid, NotFound, Silent, WaitTimeout
from tempflow.cluster.job import LogLine
from tempflow.cluster.watching import Patience
from tempflow_api import naming

# A stream that is silent for so long is opened anew: a peer that is gone would be silent, too.
_IDLE_SECONDS = 60.0
# How long a log that its node refuses is asked for after the job has ended.
_LAST_SECONDS = 15.0
# How long a line of a live log waits for an earlier one of another rank.
_HOLD_SECONDS = 0.5
_STAMP = re.compile(rb"^(\S+?)(?:\.(\d+))?(Z|[-+]\d\d:\d\d) (.*)$", re.DOTALL)


class Moment(NamedTuple):
    """To the nanosecond, which ``datetime`` is not."""

    seconds: int
    nanos: int

    def __str__(self) -> str:
        whole = datetime.fromtimestamp(self.seconds, tz=UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{whole}.{self.nanos:09}Z"


@dataclass
class PodLog:
    """The log of one pod, and how far it has been read."""

    namespace: str
    pod: str
    attempt: int
    node_rank: int
    last: Moment | None = None
    told: int = 0
    """Lines with the time ``last`` that were given."""
    _repeated: int = field(default=0, init=False)

    def query(self, *, follow: bool, tail: int | None = None) -> dict[str, str]:
        query = {"container": naming.TRAINER_CONTAINER, "timestamps": "true"}
        if follow:
            query["follow"] = "true"
        if self.last is not None:
            # Whole seconds are all that the API server passes on.
            query["sinceTime"] = str(self.last).partition(".")[0] + "Z"
        elif tail is not None:
            query["tailLines"] = str(tail)
        self._repeated = 0
        return query

    def read(
        self, connection: Connection, *, follow: bool, last: bool, tail: int | None = None
    ) -> Iterator[tuple[Moment, LogLine]]:
        """New lines of one request; ends where the answer ends. ``last`` takes a line that has no
        end: of a container that is over, the rest of it will not come."""
        path = PODS.path(self.namespace, self.pod, "log")
        query, what = self.query(follow=follow, tail=tail), f"log of pod {self.pod}"
        with connection.stream(
            path, query, what=what, idle_seconds=_IDLE_SECONDS, with_rest=last
        ) as lines:
            for line in lines:
                new = self.accept(line)
                if new is not None:
                    yield new

    def accept(self, line: bytes) -> tuple[Moment, LogLine] | None:
        """The line, None if it was told before.

        Raises ClusterError for a line without time: then it is the kubelet that speaks.
        """
        stamped = _STAMP.match(line)
        moment = _moment(stamped) if stamped else None
        if stamped is None or moment is None:
            said = line.decode(errors="replace").strip()
            raise ClusterError(f"log of pod {self.pod}: {said or 'an empty line'}")
        if self.last is not None and moment < self.last:
            return None
        if moment == self.last:
            self._repeated += 1
            if self._repeated <= self.told:
                return None
            self.told += 1
        else:
            self.last, self.told, self._repeated = moment, 1, 1
        text = stamped.group(4).decode(errors="replace").rstrip("\r")
        return moment, LogLine(str(moment), self.attempt, self.node_rank, text)


def _moment(stamped: re.Match[bytes]) -> Moment | None:
    whole, fraction, zone = (part.decode() if part else "" for part in stamped.groups()[:3])
    try:
        seconds = datetime.fromisoformat(whole + zone.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
    return Moment(int(seconds), int(fraction.ljust(9, "0")[:9]) if fraction else 0)


def pod_log(pod: Raw) -> PodLog | None:
    """The log of a pod of a job; None as long as its container has not started."""
    metadata = pod["metadata"]
    statuses = pod.get("status", {}).get("containerStatuses") or []
    state: Raw = next((s["state"] for s in statuses if s["name"] == naming.TRAINER_CONTAINER), {})
    if "running" not in state and "terminated" not in state:
        return None
    index = {**metadata.get("annotations", {}), **metadata["labels"]}.get(naming.POD_INDEX, "0")
    attempt = metadata["labels"].get(naming.LABEL_ATTEMPT, "0")
    return PodLog(metadata["namespace"], metadata["name"], int(attempt), int(index))


def merged(
    connection: Connection, logs: Iterable[PodLog], *, last: bool, tail: int | None = None
) -> Iterator[LogLine]:
    """All that the logs hold now, in the order of time."""
    sources = [log.read(connection, follow=False, last=last, tail=tail) for log in logs]
    for _, line in heapq.merge(*sources, key=lambda entry: (entry[0], entry[1][1:3])):
        yield line


def follow_one(
    connection: Connection,
    log: PodLog,
    patience: Patience,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Moment, LogLine]]:
    """The lines of one pod until its container has ended or the pod is gone."""
    ended = False
    while not stopped():
        try:
            try:
                for new in log.read(connection, follow=not ended, last=ended):
                    patience.answered()
                    yield new
            except Silent:
                if ended:
                    raise
                # A long epoch; or the end, of which nobody told.
            if ended:
                return
            ended = _has_ended(connection, log)  # then once more: lines may have come since
            patience.answered()
        except NotFound:
            return
        except Invalid as error:  # its container is about to start
            patience.endure(ClusterError(str(error), 503))
        except ClusterError as error:
            patience.endure(error)


def _has_ended(connection: Connection, log: PodLog) -> bool:
    pod = connection.send("GET", PODS.path(log.namespace, log.pod), what=f"pod {log.pod}")
    if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return True
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return any("terminated" in status["state"] for status in statuses)


@dataclass
class Held:
    """Lines of several live logs, each kept back for a moment so that an earlier one of another
    rank can overtake it."""

    hold_seconds: float = _HOLD_SECONDS
    _heap: list[tuple[Moment, int, LogLine]] = field(default_factory=list)
    _arrivals: deque[tuple[float, int]] = field(default_factory=deque)
    _out: set[int] = field(default_factory=set)
    _count: int = 0

    def put(self, moment: Moment, line: LogLine, now: float) -> None:
        self._count += 1
        heapq.heappush(self._heap, (moment, self._count, line))
        self._arrivals.append((now, self._count))

    def due(self, now: float) -> Iterator[LogLine]:
        """Lines that have waited long enough, and all that belong before them."""
        while self._arrivals and self._arrivals[0][0] + self.hold_seconds <= now:
            _, number = self._arrivals.popleft()
            while number not in self._out:
                _, popped, line = heapq.heappop(self._heap)
                self._out.add(popped)
                yield line
            self._out.discard(number)

    def rest(self) -> Iterator[LogLine]:
        yield from self.due(float("inf"))


class Follower:
    """The live logs of the pods that it is told of, one thread a pod, in one queue."""

    def __init__(
        self,
        connection: Connection,
        give_up_seconds: float | None,
        on_trouble: Callable[[str], None] | None,
    ) -> None:
        """A log that cannot be read any more ends the whole with its error, or is told to
        ``on_trouble``: the node may be lost, and the next attempt runs elsewhere."""
        self._connection = connection
        self._on_trouble = on_trouble
        self._give_up_seconds = give_up_seconds
        self._queue: queue.Queue[tuple[Moment, LogLine] | Exception] = queue.Queue(maxsize=10_000)
        self._threads: dict[str, threading.Thread] = {}
        self._patience: list[Patience] = []
        self._stop = threading.Event()

    def start(self, key: str, log: PodLog) -> None:
        """Begin to read a pod, once."""
        if key not in self._threads:
            patience = Patience(self._give_up_seconds)
            thread = threading.Thread(target=self._run, args=(log, patience), daemon=True)
            self._patience.append(patience)
            self._threads[key] = thread
            thread.start()

    def hurry(self) -> None:
        """The job is over: a node that does not give its log now is lost with it."""
        for patience in self._patience:
            patience.refused_seconds = _LAST_SECONDS

    def _run(self, log: PodLog, patience: Patience) -> None:
        try:
            for new in follow_one(self._connection, log, patience, stopped=self._stop.is_set):
                self._put(new)
                if self._stop.is_set():
                    return
        except ClusterError as error:
            if self._on_trouble is None:
                self._put(error)
            else:
                self._on_trouble(str(error))
        except Exception as error:  # the edge of a thread: it is raised in the caller's
            self._put(error)

    def _put(self, item: tuple[Moment, LogLine] | Exception) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.5)
                return

    @property
    def idle(self) -> bool:
        """Every pod's log has ended and been handed out."""
        # In this order: a thread puts its last line before it ends.
        return not any(t.is_alive() for t in self._threads.values()) and self._queue.empty()

    def next(self, timeout: float) -> tuple[Moment, LogLine] | None:
        """The next line in the order of arrival; None when there is none for ``timeout``."""
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()


def live(
    follower: Follower,
    *,
    more: Callable[[Follower], bool],
    poll_seconds: float = 1.0,
    timeout_seconds: float | None = None,
) -> Iterator[LogLine]:
    """Lines in the order of time until ``more``, which is asked once a ``poll_seconds`` and may
    start further logs, says that no others will come, and all have ended. Raises WaitTimeout."""
    held = Held()
    last_look, may_come = float("-inf"), True
    deadline = float("inf") if timeout_seconds is None else time.monotonic() + timeout_seconds
    try:
        while True:
            now = time.monotonic()
            if now >= deadline:
                yield from held.rest()
                raise WaitTimeout(
                    f"the log goes on after {timeout_seconds:.0f} s, and so does the job"
                )
            if may_come and now - last_look >= poll_seconds:
                may_come, last_look = more(follower), now
                if not may_come:
                    follower.hurry()
            new = follower.next(0.1)
            if new is not None:
                held.put(*new, time.monotonic())
            yield from held.due(time.monotonic())
            if new is None and not may_come and follower.idle:
                yield from held.rest()
                return
    finally:
        follower.close()


def of_pods(
    pods: Iterable[Raw], *, attempt: int | None = None, ranks: frozenset[int] = frozenset()
) -> dict[str, PodLog]:
    """By UID, the logs of the pods whose container has started: of that attempt if one is named,
    and of those ranks if any is."""
    found = {pod["metadata"]["uid"]: pod_log(pod) for pod in pods}
    return {
        uid: log
        for uid, log in found.items()
        if log is not None
        and attempt in (None, log.attempt)
        and (not ranks or log.node_rank in ranks)
    }
