"""An event loop whose time jumps to the next thing that is due, so that no test waits."""

import asyncio
from collections.abc import Awaitable, Callable


class VirtualLoop(asyncio.SelectorEventLoop):
    """For stories without input and output: a socket would never get its turn."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        # Both fields are asyncio's own; with nothing ready, it would sleep until the first timer.
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]  # private
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]  # private


def now() -> float:
    """Seconds of the running loop."""
    return asyncio.get_running_loop().time()


def run(story: Callable[[], Awaitable[None]]) -> None:
    """Run a story to its end; an hour of its time is too long."""

    async def bounded() -> None:
        async with asyncio.timeout(3600):
            await story()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(bounded())
