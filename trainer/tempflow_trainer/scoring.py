"""Scoring beside everything else: in a thread of its own, and watched while it is waited for.

A reward may take longer than ranks are willing to wait for one another. So no rank enters a
collective while another one still scores: all of them meet every few seconds, tell how far they
are, and go on together when the last one is done. What takes long is said in the log, and a slow
reward never looks like a dead peer. How long one may take at most is its own deadline.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow_api.errors import Preempted
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.metrics import Stopwatch

log = logging.getLogger(__name__)

# Far below any time-out of a collective, far above the cost of one.
BEAT_SECONDS = 5.0

Scores = Mapping[str, Tensor]
OnCall = Callable[[str, int], None]
"""Told of a reward that is being asked, and of the images that it has just scored."""


@dataclass
class Tally:
    """How far the scoring of a rank is; written by its thread, read by the others."""

    names: Sequence[str]
    images: int = 0
    """Handed in."""
    reward: int = 0
    """Position of the reward that is being asked."""
    done: dict[str, int] | None = None

    def note(self, name: str, images: int) -> None:
        """An ``OnCall``."""
        self.reward = self.names.index(name)
        self.done = self.done or {}
        self.done[name] = self.done.get(name, 0) + images

    def row(self, finished: bool, stopping: bool) -> Tensor:
        """For the other ranks, [1, 5]."""
        done = (self.done or {}).get(self.names[self.reward], 0)
        return torch.tensor([[int(finished), int(stopping), self.reward, done, self.images]])


class Scoring:
    """Work of one epoch, done in order, one piece at a time; so memory holds one piece's images."""

    def __init__(
        self,
        names: Sequence[str],
        ranks: Ranks,
        stop_requested: Callable[[], bool] = lambda: False,
        clock: Stopwatch | None = None,
    ) -> None:
        """``names`` are the rewards, the same on every rank."""
        self.tally = Tally(names)
        self._ranks, self._stop_requested = ranks, stop_requested
        self._clock = clock or Stopwatch()
        self._waiting: queue.SimpleQueue[tuple[Callable[[OnCall], Scores], Future[Scores]] | None]
        self._waiting = queue.SimpleQueue()
        self._results: list[Future[Scores]] = []
        self._intervals: list[tuple[float, float]] = []
        # A daemon: a reward that hangs must not keep a process that was asked to stop.
        threading.Thread(target=self._work, name="scoring", daemon=True).start()

    def submit(self, images: int, work: Callable[[OnCall], Scores]) -> None:
        """Hand in ``work``, which scores so many images; it starts when earlier work is done."""
        self.tally.images += images
        future: Future[Scores] = Future()
        self._results.append(future)
        self._waiting.put((work, future))

    def wait(self) -> dict[str, Tensor]:
        """All scores, in the order of the work, once every rank has its own.

        Raises:
            Preempted: on every rank, when one was asked to stop before all were done.
            RewardFailed: as raised by the work, on its own rank.
        """
        began = time.perf_counter()
        self._waiting.put(None)
        last = self._results[-1] if self._results else None
        while True:
            finished = last is None or self._ends_within(last, BEAT_SECONDS)
            stopping = not finished and self._stop_requested()
            rows = torch.cat(self._ranks.gather_rows(self.tally.row(finished, stopping)))
            if bool(rows[:, 0].all()):
                break
            if bool(rows[:, 1].any()):
                raise Preempted("asked to stop")
            self._tell(rows, time.perf_counter() - began)
        parts = [future.result() for future in self._results]
        hidden = sum(max(0.0, min(end, began) - start) for start, end in self._intervals)
        self._clock.hide("scoring", hidden)
        return {name: torch.cat([p[name] for p in parts]) for name in (parts[0] if parts else {})}

    def _ends_within(self, last: Future[Scores], seconds: float) -> bool:
        """Whether the work is done; raises what failed, at once."""
        deadline = time.monotonic() + seconds
        for future in self._results:
            try:
                future.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                if not future.done():
                    return False
                raise
        return last.done()

    def _tell(self, rows: Tensor, seconds: float) -> None:
        for rank, (finished, _, reward, done, images) in enumerate(rows.tolist()):
            if not finished and self._ranks.is_first:
                log.info(
                    "waiting for reward %s on rank %d: %d/%d images after %.0f s",
                    self.tally.names[reward],
                    rank,
                    done,
                    images,
                    seconds,
                )

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            work, future = item
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    found = work(self.tally.note)
            except BaseException as error:  # handed to the rank's own thread, which raises it
                future.set_exception(error)
                return
            self._intervals.append((start, time.perf_counter()))
            future.set_result(found)
