"""Checkpoints beside the training: it waits for a copy in memory, a thread does the rest.

One checkpoint is in flight. A thread, not a process: hashing, disk and network mostly wait outside
the interpreter's lock; ``benchmarks/checkpoint.py`` compares the two.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tempflow_api.errors import Fenced, StoreUnavailable, Uncommitted
from tempflow_api.record import Save as SaveLine
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.metrics import now

log = logging.getLogger(__name__)


@dataclass
class Save:
    """One checkpoint on its way, and what became of it."""

    step: int
    stall_seconds: float
    """That training waited, for the copy in memory and for the save before."""
    stage_seconds: float = 0.0
    """Writing to local disk, with digests."""
    send_seconds: float = 0.0
    """From the first request to the entry that makes it count."""
    bytes: int = 0
    folder: str | None = None
    error: BaseException | None = None

    def line(self) -> SaveLine:
        """For the record of the run."""
        return SaveLine(
            epoch=self.step,
            time=now(),
            stall_seconds=self.stall_seconds,
            stage_seconds=self.stage_seconds,
            send_seconds=self.send_seconds,
            bytes=self.bytes,
            folder=self.folder,
            error=str(self.error) if self.error else None,
        )


class Saver:
    """Starts saves and tells how they ended; used by the training's thread only."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        before: Callable[[], None] = lambda: None,
        wait_seconds: float,
        most_failures: int,
        on_end: Callable[[Save], None],
        write: Callable[[SaveLine], None],
        after: Callable[[], None],
    ) -> None:
        """
        Args:
            before: precedes the requests of a save, in the saver's own thread; its failure is a
                warning, but for Fenced.
            wait_seconds: longest wait for the save before; then the new one is skipped.
            most_failures: so many failed or skipped saves in a row end the run.
            on_end: told of every save that ended, well or not, in the training's thread.
            write: gets the line of every save, also of one that was skipped, before ``after``: what
                that stores is whole.
            after: follows a commit in the saver's own thread; its failure is a warning, but for
                Fenced.
        """
        self._checkpoints, self._before = checkpoints, before
        self._wait_seconds, self._most_failures = wait_seconds, most_failures
        self._on_end, self._write, self._after = on_end, write, after
        self._thread: threading.Thread | None = None
        self._save = Save(0, 0.0)
        self.failures = 0
        """Saves in a row that were skipped, or ended without a checkpoint."""

    def ready(self, step: int) -> bool:
        """Wait for the save before; False when it takes too long, and that of ``step`` is skipped.

        Raises:
            TempFlowError: as ``settle`` does.
        """
        if self.settle(self._wait_seconds):
            return True
        reason = f"skipped, as the one before took more than {self._wait_seconds:g} s"
        skipped = Save(step, self._wait_seconds, error=StoreUnavailable(reason))
        self._write(skipped.line())
        self._count_failure(reason)
        return False

    def begin(
        self,
        state: State,
        export: Callable[[Path], None],
        evaluation: Mapping[str, float],
        *,
        stall_seconds: float = 0.0,
    ) -> None:
        """Save, when ``ready``.

        Args:
            state: copies in memory, which training does not change.
            export: writes the exported result of that state into a folder.
            evaluation: metrics of this step, if it was evaluated.
            stall_seconds: that training has waited for this.
        """
        self._save = save = Save(state.epochs_done, stall_seconds)
        self._thread = threading.Thread(
            target=self._run, args=(save, state, export, evaluation), name="save", daemon=True
        )
        self._thread.start()

    def settle(self, seconds: float) -> bool:
        """Wait for the save in flight, if there is one; whether none is in flight any more.

        Raises:
            Fenced: a newer start has taken the run over.
            Uncommitted: too many saves failed in a row.
        """
        if self._thread is None:
            return True
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        self._thread, save = None, self._save
        self._on_end(save)
        if save.error is None:
            self.failures = 0
        elif isinstance(save.error, StoreUnavailable):
            self._count_failure(str(save.error))
        else:
            raise save.error
        return True

    def _count_failure(self, reason: str) -> None:
        self.failures += 1
        log.error("no checkpoint this time: %s", reason)
        if self.failures >= self._most_failures:
            raise Uncommitted(
                f"{self.failures} checkpoints in a row could not be stored, so more training "
                f"would be lost with the next fault: {reason}"
            )

    def _prepare(self, step: int) -> None:
        try:
            self._before()
        except (StoreUnavailable, OSError) as error:
            log.warning("the record is not stored up to epoch %d: %s", step, error)

    def _run(
        self,
        save: Save,
        state: State,
        export: Callable[[Path], None],
        evaluation: Mapping[str, float],
    ) -> None:
        try:
            start = time.perf_counter()
            with self._checkpoints.staged(state, export) as staged:
                save.bytes = staged.bytes
                save.stage_seconds = time.perf_counter() - start
                self._prepare(save.step)
                start = time.perf_counter()
                save.folder = self._checkpoints.send(staged, evaluation)
                save.send_seconds = time.perf_counter() - start
        except BaseException as error:  # handed over to the training's thread
            save.error = error
        try:
            self._write(save.line())
            if save.error is None:
                self._after()
        except Fenced as error:
            save.error = error
        except (StoreUnavailable, OSError) as error:  # also a file that a tracker has taken away
            log.warning("the record of the save after epoch %d is not whole: %s", save.step, error)
