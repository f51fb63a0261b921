"""Reads each running job's progress from its rank 0, in the background.

The answer comes from a container that runs somebody's code: it is bounded in size and time, taken
only in the exact form, only from the current attempt, and no pass ever waits for it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from pydantic import ValidationError

from tempflow_api.naming import PROGRESS_PATH, PROGRESS_PORT
from tempflow_api.status import Progress
from tempflow_operator.decisions.observed import Key
from tempflow_operator.decisions.reading import Reading
from tempflow_operator.metrics import Metrics
from tempflow_operator.settings import Progress as ProgressSettings

logger = logging.getLogger(__name__)

_USER_AGENT = "tempflow-operator"


class Unusable(Exception):
    """The answer is not the progress of the attempt that was asked; the text says why."""


@dataclass(frozen=True)
class Target:
    """Whom to ask."""

    pod_uid: str
    ip: str
    attempt: int
    run_id: str
    port: int = PROGRESS_PORT

    @property
    def url(self) -> str:
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"http://{host}:{self.port}{PROGRESS_PATH}"


def parse(body: bytes, run_id: str, attempt: int) -> Progress:
    """The progress in an answer; Unusable when it is anything else."""
    try:
        progress = Progress.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the answer"
        raise Unusable(f"not a progress record: {where}: {problem['msg']}") from None
    if progress.run_id != run_id:
        raise Unusable("it is the progress of another run")
    if progress.attempt != attempt:
        raise Unusable(f"it is the progress of attempt {progress.attempt}")
    if progress.epoch > progress.epochs:
        raise Unusable(f"epoch {progress.epoch} of {progress.epochs}")
    return progress


@dataclass
class _Watched:
    target: Target
    due: float
    reading: Reading | None = None
    failures: int = 0
    busy: bool = False


class ProgressReader:
    """Asks every watched job's rank 0 once an interval."""

    def __init__(
        self,
        settings: ProgressSettings,
        *,
        clock: Callable[[], float],
        on_change: Callable[[Key], None],
        metrics: Metrics,
    ) -> None:
        """``on_change`` is told of a job whose reading is not what it was."""
        self._settings = settings
        self._clock = clock
        self._on_change = on_change
        self._metrics = metrics
        self._watched: dict[Key, _Watched] = {}
        self._changed = asyncio.Event()

    def reading(self, key: Key, target: Target | None) -> Reading | None:
        """The newest reading of exactly that target, which is watched from now on; None ends the
        watch."""
        if target is None:
            self._watched.pop(key, None)
            return None
        watched = self._watched.get(key)
        if watched is None or watched.target != target:
            self._watched[key] = watched = _Watched(target, due=self._clock())
            self._changed.set()
        return watched.reading

    def last(self, key: Key) -> Reading | None:
        """The newest reading of whom is watched for that job."""
        watched = self._watched.get(key)
        return watched.reading if watched is not None else None

    async def run(self) -> None:
        """Read until cancelled."""
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout)
        # The environment's proxy is for the outside world, and cookies are nobody's business here.
        async with (
            aiohttp.ClientSession(
                timeout=timeout,
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(
                    limit=self._settings.parallel, force_close=True, enable_cleanup_closed=True
                ),
                headers={"User-Agent": _USER_AGENT},
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                now = self._clock()
                for key, watched in self._watched.items():
                    if watched.due <= now and not watched.busy:
                        watched.busy = True
                        watched.due = now + self._settings.interval
                        group.create_task(self._read(session, key, watched))
                await self._wait(now)

    async def _wait(self, now: float) -> None:
        due = min((w.due for w in self._watched.values()), default=now + self._settings.interval)
        self._changed.clear()
        with contextlib.suppress(TimeoutError):  # a read is due
            # A floor, so that a read which outlasts its interval does not make this loop spin.
            await asyncio.wait_for(self._changed.wait(), max(0.05, due - now))

    async def _read(self, session: aiohttp.ClientSession, key: Key, watched: _Watched) -> None:
        before = watched.reading
        try:
            body = await fetch(session, watched.target.url, self._settings.max_bytes)
            watched.reading = Reading(parse(body, watched.target.run_id, watched.target.attempt))
            watched.failures = 0
            result = "ok"
        except (Unusable, aiohttp.ClientError, TimeoutError, OSError) as error:
            result = "unusable" if isinstance(error, Unusable) else "unreachable"
            watched.failures += 1
            if watched.failures >= self._settings.tolerated_failures:
                known = before.progress if before is not None else None
                watched.reading = Reading(known, _in_words(error))
            logger.debug("progress of %s: %s", key, _in_words(error))
        finally:
            watched.busy = False
        self._metrics.progress_reads.labels(result).inc()
        if watched.reading != before and self._watched.get(key) is watched:
            self._on_change(key)


async def fetch(session: aiohttp.ClientSession, url: str, max_bytes: int) -> bytes:
    """The body of a plain answer. A redirect is not followed: it could lead anywhere."""
    async with session.get(url, allow_redirects=False) as response:
        if response.status != 200:
            raise Unusable(f"HTTP status {response.status}")
        body = b""
        async for chunk in response.content.iter_chunked(4096):
            body += chunk
            if len(body) > max_bytes:
                raise Unusable(f"longer than {max_bytes} bytes")
    return body


def _in_words(error: Exception) -> str:
    """A short reason that stays the same while the problem does: it stands in a condition."""
    if isinstance(error, Unusable):
        return str(error)[:200]
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError | ConnectionError):
        return "no connection"
    return "no HTTP answer"
