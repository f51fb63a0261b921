"""What a run writes about itself: JSON lines, the progress record, times by phase."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tempflow_api import checkpoint_layout as layout
from tempflow_api.course import POINTS, course
from tempflow_api.record import Evaluation, Metrics
from tempflow_api.status import Progress

log = logging.getLogger(__name__)

PHASE_NOTE = "in phase: "

Line = TypeVar("Line", bound=BaseModel)


class Stopwatch:
    """Seconds by phase. ``on_phase`` hears each phase as it begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.hidden: dict[str, float] = {}
        """Seconds of work that ran beside another phase, by the phase that it belongs to."""
        self.on_phase: Callable[[str], None] = lambda _phase: None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside the context for ``phase``; an error is noted to be of it."""
        self.on_phase(phase)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(PHASE_NOTE + phase)
            raise
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def hide(self, phase: str, seconds: float) -> None:
        """Add to ``hidden``."""
        self.hidden[phase] = self.hidden.get(phase, 0.0) + seconds

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """Seconds by phase after a copy of ``seconds`` was taken."""
        return {
            p: s - before.get(p, 0.0) for p, s in self.seconds.items() if s > before.get(p, 0.0)
        }


def phase_of(error: BaseException) -> str | None:
    """The phase in which an error arose; None outside of all phases."""
    notes = getattr(error, "__notes__", [])
    phases = [n.removeprefix(PHASE_NOTE) for n in notes if n.startswith(PHASE_NOTE)]
    return phases[0] if phases else None


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def say(line: Metrics, epochs: int) -> None:
    """Log how an epoch went."""
    log.info(
        "epoch %d of %d: reward %.4f, %.0f images/s",
        line.epoch,
        epochs,
        line.reward,
        line.images_per_second,
    )
    if line.groups_left_out:
        log.warning(
            "epoch %d: %d groups of draws lack a required score and are left out",
            line.epoch,
            line.groups_left_out,
        )


class Record:
    """The files below ``record/`` of a run's folder; rank 0 writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rewards: list[float] = []
        (folder / layout.GRIDS).mkdir(parents=True, exist_ok=True)

    def append(self, name: str, line: BaseModel) -> None:
        """Add one line to a file of lines."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json(by_alias=True) + "\n")
        if isinstance(line, Metrics):
            self._rewards.append(line.reward)

    def reward_course(self) -> list[float]:
        """Of the epochs that count, for whoever looks at the job."""
        return [float(f"{mean:.4g}") for mean in course(self._rewards, POINTS)]

    def lines(self, name: str, kind: type[Line]) -> list[Line]:
        """The whole lines of a file of lines; a kill may have left the last one unfinished."""
        path = self.folder / name
        if not path.is_file():
            return []
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        return [kind.model_validate_json(line) for line in whole.splitlines()]

    def read(self, name: str, kind: type[Line]) -> Line | None:
        """A file of one object; None if it is not there or of another version."""
        try:
            return kind.model_validate_json((self.folder / name).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def cut_back(self, epoch: int) -> None:
        """Forget what lies after ``epoch``: a run that continues from there writes it again."""
        metrics = [line for line in self.lines(layout.METRICS, Metrics) if line.epoch <= epoch]
        self._replace(layout.METRICS, metrics)
        self._rewards = [line.reward for line in metrics]
        seen = [line for line in self.lines(layout.EVALUATIONS, Evaluation) if line.epoch <= epoch]
        self._replace(layout.EVALUATIONS, seen)

    def _replace(self, name: str, lines: Sequence[BaseModel]) -> None:
        self.write(name, "".join(line.model_dump_json(by_alias=True) + "\n" for line in lines))

    def write(self, name: str, text: str) -> None:
        """Replace a file; a reader sees the old or the new one."""
        path = self.folder / name
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    def progress(self, progress: Progress) -> None:
        """Replace the progress record."""
        self.write(layout.PROGRESS, progress.model_dump_json(by_alias=True))
