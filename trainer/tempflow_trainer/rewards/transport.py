"""Requests to servers that come and go: deadlines, back-off, circuit breakers, balance.

A call ends in an answer, or by its deadline in ``ServiceFailed``. In between it is tried again
where trying again makes sense: the connection was refused or broken, the server was silent for
too long, had no room, or said that it failed. What a server answers wrongly is not asked twice.
"""

import asyncio
import atexit
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import aiohttp

from tempflow_api.errors import Preempted, RewardFailed

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

FIRST_BACK_OFF_SECONDS = 0.2
LONGEST_BACK_OFF_SECONDS = 30.0
"""A server that loads its model anew takes minutes; half a minute more is not felt, and hundreds of
clients that return do not come all at once."""
STARTING_BACK_OFF_SECONDS = 4.0
"""Instead, for a server that starts together with those who wait for it: they have nothing else to
do, and it has nobody to serve."""
FAILURES_TO_OPEN = 3
"""One failure is an accident, three in a row are a server that is away."""
STOP_SECONDS = 0.5
"""Between two looks whether the process was asked to stop."""
ANSWER_BYTES = 64 << 20
"""Longest answer that is read."""


class ServiceFailed(RuntimeError):
    """No usable answer; the message says from where, and why."""


class Absent(RewardFailed):
    """Nobody answers where a reward is to be scored; somebody may later."""


class Unavailable(Exception):
    """The server cannot answer now; ``retry_after`` seconds are what it asks for."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


@dataclass
class Breaker:
    """Keeps requests from a server that failed several times in a row.

    Closed, everything passes. It opens after ``FAILURES_TO_OPEN`` failures in a row; when its time
    is over one request may try, and its outcome closes the breaker or opens it for twice as long.
    """

    longest_seconds: float = LONGEST_BACK_OFF_SECONDS
    failures: int = 0
    opened_until: float = 0.0
    probing: bool = False

    @property
    def closed(self) -> bool:
        return self.failures < FAILURES_TO_OPEN

    def admits(self, now: float) -> bool:
        """Whether a request may pass at ``now``."""
        return self.closed or (now >= self.opened_until and not self.probing)

    def started(self) -> None:
        self.probing = not self.closed

    def succeeded(self) -> None:
        self.failures, self.probing = 0, False

    def failed(self, now: float) -> None:
        self.failures, self.probing = self.failures + 1, False
        if not self.closed:
            doubled = FIRST_BACK_OFF_SECONDS * 2.0 ** min(self.failures, 20)
            self.opened_until = now + min(doubled, self.longest_seconds)


@dataclass
class Endpoint:
    """One server."""

    url: str
    breaker: Breaker = field(default_factory=Breaker)
    in_flight: int = 0
    served: int = 0

    @contextmanager
    def trying(self) -> Iterator[None]:
        """One attempt: what it raises counts as a failure if it is the server's."""
        self.in_flight += 1
        self.breaker.started()
        try:
            yield
        except (Unavailable, aiohttp.ClientError, TimeoutError, OSError):
            self.breaker.failed(time.monotonic())
            raise
        except BaseException:
            self.breaker.probing = False
            raise
        else:
            self.breaker.succeeded()
            self.served += 1
        finally:
            self.in_flight -= 1


def choose(endpoints: Sequence[Endpoint], now: float) -> Endpoint | None:
    """The server with the fewest requests under way and failures in a row, then the one that served
    least; None while the breakers of all are open."""
    open_to_us = [endpoint for endpoint in endpoints if endpoint.breaker.admits(now)]
    return min(
        open_to_us,
        key=lambda e: (e.in_flight + min(e.breaker.failures, FAILURES_TO_OPEN), e.served),
        default=None,
    )


def back_off(
    attempt: int,
    retry_after: float | None,
    draw: Callable[[], float],
    longest_seconds: float = LONGEST_BACK_OFF_SECONDS,
) -> float:
    """Seconds to wait after ``attempt`` attempts: a random share of a doubling bound
    (full jitter), never less than the server asked for, never more than the longest."""
    bound = min(FIRST_BACK_OFF_SECONDS * 2.0 ** min(attempt, 20), longest_seconds)
    return min(max(draw() * bound, retry_after or 0.0), longest_seconds)


class Background:
    """An event loop in a daemon thread, for callers that are no coroutines."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="reward-client").start()

    def run(
        self,
        work: Coroutine[Any, Any, Answer],
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """The result of ``work``; an interrupt of the caller cancels it.

        Raises:
            Preempted: the caller was asked to stop first.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                done, _ = wait([future], STOP_SECONDS)
                if done:
                    return future.result()
                if stop_requested():
                    raise Preempted("asked to stop")
        finally:
            future.cancel()

    def run_quietly(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """For the end of the process: what does not end soon is left behind."""
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        with suppress(TimeoutError):
            future.result(1.0)


@dataclass
class Transport:
    """Asks the endpoints of one service, all of which answer alike."""

    endpoints: Sequence[Endpoint]
    timeout_seconds: float
    """Of one attempt, from connecting to the last byte."""
    deadline_seconds: float
    """Of one call with all its attempts."""
    token: str | None = None
    longest_back_off_seconds: float = LONGEST_BACK_OFF_SECONDS
    background: Background = field(default_factory=Background)
    draw: Callable[[], float] = random.Random().random  # noqa: S311 (jitter is no secret)
    _session: aiohttp.ClientSession | None = None

    def patient(self, seconds: float) -> "Transport":
        """For the first answer of servers that are starting: so long, and asked often."""
        longest = STARTING_BACK_OFF_SECONDS
        return replace(
            self,
            endpoints=[Endpoint(end.url, Breaker(longest)) for end in self.endpoints],
            deadline_seconds=seconds,
            longest_back_off_seconds=longest,
        )

    async def exchange(
        self, ask: Callable[[aiohttp.ClientSession, str], Awaitable[Answer]]
    ) -> Answer:
        """What ``ask`` returns from one of the endpoints.

        Raises:
            ServiceFailed: raised by ``ask``, or the deadline passed.
        """
        deadline = time.monotonic() + self.deadline_seconds
        attempt, last = 0, "no endpoint was asked"
        while (now := time.monotonic()) < deadline:
            endpoint = choose(self.endpoints, now)
            if endpoint is None:
                await asyncio.sleep(min(FIRST_BACK_OFF_SECONDS, deadline - now))
                continue
            attempt += 1
            retry_after = None
            try:
                with endpoint.trying():
                    async with asyncio.timeout(min(self.timeout_seconds, deadline - now)):
                        return await ask(self._connected(), endpoint.url)
            except Unavailable as error:
                last, retry_after = f"{endpoint.url}: {error}", error.retry_after
            except TimeoutError:
                last = f"{endpoint.url}: no answer within {self.timeout_seconds:g} s"
            except (aiohttp.ClientError, OSError) as error:
                last = f"{endpoint.url}: {error or type(error).__name__}"
            # One round over all endpoints is one attempt of the service.
            turn, longest = attempt // len(self.endpoints), self.longest_back_off_seconds
            pause = back_off(turn, retry_after, self.draw, longest)
            log.warning("%s; attempt %d, the next one in %.1f s", last, attempt, pause)
            await asyncio.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        raise ServiceFailed(
            f"no answer within {self.deadline_seconds:g} s and {attempt} attempts; the last: {last}"
        )

    def _connected(self) -> aiohttp.ClientSession:
        """The session, which belongs to the loop that runs this."""
        if self._session is None:
            headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            self._session = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(limit=0),
            )
            # The loop's thread still runs then; unclosed, the session would complain at the end.
            atexit.register(self.background.run_quietly, self._session.close)
        return self._session


async def read_answer(response: aiohttp.ClientResponse) -> bytes:
    """The body of a success.

    Raises:
        Unavailable: the server failed, or has no room.
        ServiceFailed: it refuses, and would again.
    """
    body = await response.content.read(ANSWER_BYTES + 1)
    while not response.content.at_eof():
        more = await response.content.read(ANSWER_BYTES)
        body += more
        if len(body) > ANSWER_BYTES:
            raise ServiceFailed(f"{response.url} answers with more than {ANSWER_BYTES} bytes")
    if response.status == 200:
        return body
    said = body[:500].decode(errors="replace").strip()
    message = f"status {response.status}: {said}"
    if response.status in (408, 429) or response.status >= 500:
        raise Unavailable(message, _seconds(response.headers.get("Retry-After")))
    raise ServiceFailed(f"{response.url} refuses with {message}")


def _seconds(retry_after: str | None) -> float | None:
    """Of the form that is a number; a date is ignored, as the own back-off does as well."""
    try:
        return None if retry_after is None else max(0.0, float(retry_after))
    except ValueError:
        return None
