"""Checkpoints as the epochs of a run see them: begun, waited for, and agreed upon by all ranks."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.record import Save as SaveLine
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.metrics import Record, now
from tempflow_trainer.saving import Save, Saver

log = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
END_SECONDS = 25
"""Of the time between the request to stop and the kill: for the launcher and for what ends."""


@dataclass
class Commits:
    """Every method is called by all ranks together; what is stored, rank 0 stores."""

    spec: JobSpec
    ranks: Ranks
    checkpoints: Checkpoints
    record: Record
    copy: Callable[[], State]
    """A copy in memory of the state as it is."""
    export: Callable[[Path, dict[str, Tensor]], None]
    """Writes the result people use, from the average."""
    send_record: Callable[[], None]
    announce: Callable[[], None]
    """Told, on rank 0, when there is a newer checkpoint."""
    step: int | None = None
    """Epochs of the newest checkpoint; up to date on rank 0."""
    uri: str | None = None
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        settings = self.spec.checkpoint
        self.saver = Saver(
            self.checkpoints,
            wait_seconds=settings.max_wait_seconds,
            most_failures=settings.max_failed_saves,
            on_end=self._saved,
            after=self.send_record,
        )

    def begin(self, evaluation: Mapping[str, float]) -> None:
        """Begin to save, unless the save before takes too long.

        Args:
            evaluation: metrics of this step, if it was evaluated.

        Raises:
            Uncommitted: on every rank, when too many saves failed in a row.
            Fenced: on every rank, when a newer start has taken the run over.
        """
        start = time.perf_counter()
        if not self.ranks.agree(self.saver.ready):
            return
        state = self.copy()  # all ranks take part where weights are in parts
        if self.ranks.is_first:
            self.saver.begin(
                state,
                lambda folder: self.export(folder, state.average),
                evaluation,
                stall_seconds=time.perf_counter() - start,
            )

    def look(self) -> None:
        """Learn how the save in flight ended, if it has; raises as ``begin`` does."""
        self.ranks.agree(lambda: self.saver.settle(0))

    def settle(self) -> None:
        """Wait until no save is in flight; raises as ``begin`` does."""
        while not self.ranks.agree(lambda: self.saver.settle(WAIT_SECONDS)):
            log.info("waits for a checkpoint")

    def complete(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Until ``step`` is committed: the last checkpoint is what the run was for.

        Raises:
            Uncommitted: it cannot be; failures are counted, so this ends.
        """
        self.settle()
        while not self.ranks.agree(lambda: self.step == step):
            self.begin(evaluation)
            self.settle()

    def in_time(self, step: int, evaluation: Mapping[str, float]) -> str:
        """Commit ``step`` within the time that is left after a request to stop, and say so."""
        # The launcher's reserve, and some for the processes to end.
        left = self.spec.run_policy.termination_grace_period_seconds - END_SECONDS
        until = time.monotonic() + max(left, 1)

        def settled() -> bool:
            return self.saver.settle(max(until - time.monotonic(), 0))

        if self.ranks.agree(settled) and not self.ranks.agree(lambda: self.step == step):
            self.begin(evaluation)
            self.ranks.agree(settled)
        stopped = f"stopped after {step} of {self.spec.algorithm.epochs} epochs; "
        if self.ranks.agree(lambda: self.step == step):
            return f"{stopped}the state is committed at {self.uri}"
        return (
            f"{stopped}they could not be stored in time, so the run continues from the checkpoint "
            "before; allow more with spec.runPolicy.terminationGracePeriodSeconds"
        )

    def _saved(self, save: Save) -> None:
        if save.folder is not None:
            self.step = save.step
            self.uri = f"{self.checkpoints.store.uri}/{save.folder}"
            # At once: whoever ends this process now still learns which checkpoint is the newest.
            self.announce()
        self.record.append(
            layout.SAVES,
            SaveLine(
                epoch=save.step,
                time=now(),
                stall_seconds=save.stall_seconds,
                stage_seconds=save.stage_seconds,
                send_seconds=save.send_seconds,
                bytes=save.bytes,
                folder=save.folder,
                error=str(save.error) if save.error else None,
            ),
        )
