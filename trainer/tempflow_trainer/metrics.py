"""What a run writes about itself: JSON lines, the progress record, times by phase."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tempflow_api import checkpoint_layout as layout
from tempflow_api.status import Progress

Row = dict[str, Any]
"""One line of a record: JSON values by name."""


class Stopwatch:
    """Seconds by phase. ``on_phase`` hears each phase as it begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.on_phase: Callable[[str], None] = lambda _phase: None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside the context for ``phase``."""
        self.on_phase(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """Seconds by phase after a copy of ``seconds`` was taken."""
        return {
            p: s - before.get(p, 0.0) for p, s in self.seconds.items() if s > before.get(p, 0.0)
        }


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Record:
    """The files below ``record/`` of a run's folder; rank 0 writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / layout.GRIDS).mkdir(parents=True, exist_ok=True)

    def append(self, name: str, row: Row) -> None:
        """Add one line to a file of lines."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, name: str) -> list[Row]:
        """The lines of a file of lines; none if it is not there."""
        path = self.folder / name
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    def cut_back(self, epoch: int) -> None:
        """Forget what lies after ``epoch``: a run that continues from there writes it again."""
        for name in (layout.METRICS, layout.EVALUATIONS):
            kept = [row for row in self._whole_rows(name) if row["epoch"] <= epoch]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            self.write(name, text)

    def _whole_rows(self, name: str) -> list[Row]:
        """Like ``rows``, without a last line that a kill left unfinished."""
        path = self.folder / name
        if not path.is_file():
            return []
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def write(self, name: str, text: str) -> None:
        """Replace a file; a reader sees the old or the new one."""
        path = self.folder / name
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    def progress(self, progress: Progress) -> None:
        """Replace the progress record."""
        self.write(layout.PROGRESS, progress.model_dump_json(by_alias=True))
