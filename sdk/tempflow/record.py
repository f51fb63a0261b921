"""What a run writes about itself while it runs, read back: ``record/`` of its folder.

The trainer writes these files, one JSON object a line, or one file replaced as a whole.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tempflow_api import checkpoint_layout as layout
from tempflow_api.record import Evaluation, Metrics, Summary
from tempflow_api.status import Progress

_Line = TypeVar("_Line", bound=BaseModel)


class Record:
    """The record of a run that may still grow.

    ``epochs`` and ``evaluations`` yield each line once, whole lines only. What is not (yet) valid
    is skipped: a view must never end a run.
    """

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._epochs = _Lines(run_folder / layout.METRICS)
        self._evaluations = _Lines(run_folder / layout.EVALUATIONS)

    def epochs(self) -> Iterator[Metrics]:
        """Epochs recorded since the last call."""
        return _valid(Metrics, self._epochs.new())

    def evaluations(self) -> Iterator[Evaluation]:
        """Evaluations recorded since the last call."""
        return _valid(Evaluation, self._evaluations.new())

    def progress(self) -> Progress | None:
        """The progress record as it stands now."""
        return _read(Progress, self._folder / layout.PROGRESS)

    def summary(self) -> Summary | None:
        """The summary, once the run is done."""
        return _read(Summary, self._folder / layout.SUMMARY)


class _Lines:
    """Whole lines of a file as it grows; a file that has shrunk is read anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        if not whole:
            return []
        self._offset += len(whole) + 1
        return whole.split(b"\n")


def _valid(model: type[_Line], lines: list[bytes]) -> Iterator[_Line]:
    for line in lines:
        try:
            yield model.model_validate_json(line)
        except ValidationError:
            continue


def _read(model: type[_Line], path: Path) -> _Line | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
