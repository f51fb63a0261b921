"""Waiting on a condition with a deadline, and saying what happens with the seconds it took."""

import time
from collections.abc import Callable
from typing import TypeVar

from tests.cluster.errors import ClusterError

T = TypeVar("T")
Say = Callable[[str], None]


def wait_for(
    what: str,
    condition: Callable[[], T | None],
    *,
    deadline_seconds: float,
    poll_seconds: float = 0.2,
) -> T:
    """The first true value of the condition; ClusterError when the deadline comes before it."""
    started = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() - started > deadline_seconds:
            raise ClusterError(f"{what}: not so after {deadline_seconds:.0f} s")
        time.sleep(poll_seconds)


def progress_lines() -> Say:
    """A function that prints a line with the seconds since this call."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    return say
