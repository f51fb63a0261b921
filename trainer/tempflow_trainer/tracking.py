"""The record as curves in TensorBoard and Weights & Biases, where a job asks for them.

``record/*.jsonl`` stays what is true: trackers are written beside it by rank 0, and a run that goes
on writes on the same curves.
"""

import importlib.util
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ManifestInvalid, Problem
from tempflow_api.record import Evaluation, Metrics
from tempflow_api.v1alpha1 import JobSpec
from tempflow_api.v1alpha1 import Tracking as Asked

TENSORBOARD = f"{layout.RECORD}/tensorboard"
WANDB = "wandb"


def require(asked: Asked) -> None:
    """Before a model is loaded: are the packages there?

    Raises:
        ManifestInvalid: one is not; the message names the extra.
    """
    wanted = {"tensorboard": asked.tensorboard, WANDB: asked.wandb is not None}
    problems = [
        Problem(
            f"spec.tracking.{name}",
            f"the package {name} is not installed where the job runs: "
            f"pip install 'tempflow[{name}]', or leave the field out",
        )
        for name, used in wanted.items()
        if used and importlib.util.find_spec(name) is None
    ]
    if problems:
        raise ManifestInvalid("the job", problems)


def numbers(line: BaseModel, prefix: str) -> dict[str, float]:
    """Every number of a line by its path, ``train/rewards/judge``, but the epoch."""

    def flat(value: object, path: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flat(inner, f"{path}/{key}")
        elif isinstance(value, int | float):
            yield path, float(value)

    content = line.model_dump(by_alias=True, exclude={"epoch"})
    return dict(flat(content, prefix))


class Tracker(ABC):
    """A place for curves over epochs."""

    @abstractmethod
    def begin(self, epoch: int) -> None:
        """The run goes on after ``epoch``; what was written of later ones does not count."""

    @abstractmethod
    def write(self, epoch: int, values: Mapping[str, float], picture: Path | None) -> None:
        """Points of the curves at an epoch, and the picture of an evaluation."""

    @abstractmethod
    def end(self) -> None:
        """Everything is on disk, or sent."""


class TensorBoard(Tracker):
    """Event files below the record, stored with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def begin(self, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.end()
        self._writer = SummaryWriter(str(self._folder), purge_step=epoch + 1)

    def write(self, epoch: int, values: Mapping[str, float], picture: Path | None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        if picture is not None:
            import numpy as np

            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image("eval/grid", pixels, epoch, dataformats="HWC")
        self._writer.flush()

    def end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases; its name is the job's, its identity stays with the record."""

    def __init__(self, folder: Path, name: str, spec: JobSpec) -> None:
        self._folder, self._name, self._spec = folder, name, spec
        self._run: Any = None

    def begin(self, epoch: int) -> None:
        del epoch  # curves are over the logged epoch: a repeated one lies on the first
        if self._run is not None:
            return
        import wandb

        asked = self._spec.tracking.wandb
        assert asked is not None  # noqa: S101 (who asks for none builds none)
        try:
            self._run = wandb.init(
                project=asked.project,
                entity=asked.entity,
                mode=asked.mode,
                name=self._name,
                id=self._identity(),
                resume="allow",
                dir=str(self._folder / layout.RECORD if asked.mode == "offline" else self._folder),
                config=self._spec.model_dump(mode="json", by_alias=True),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise ManifestInvalid(
                "the job",
                [
                    Problem(
                        "spec.tracking.wandb",
                        f"Weights & Biases refuses: {error}; set WANDB_API_KEY in the environment "
                        "or compute.secretName, or mode: offline",
                    )
                ],
            ) from error
        self._run.define_metric("*", step_metric="epoch")

    def write(self, epoch: int, values: Mapping[str, float], picture: Path | None) -> None:
        import wandb

        content: dict[str, object] = {"epoch": epoch, **values}
        if picture is not None:
            content["eval/grid"] = wandb.Image(str(picture))
        self._run.log(content)

    def end(self) -> None:
        if self._run is None:
            return
        import wandb

        self._run.finish()
        self._run = None
        wandb.teardown()  # only now its process has written everything

    def _identity(self) -> str:
        file = self._folder / layout.RECORD / "wandb-id"
        if not file.is_file():
            file.write_text(uuid.uuid4().hex)
        return file.read_text().strip()


@dataclass(frozen=True)
class Tracking:
    """All trackers of a run; none on ranks other than the first."""

    trackers: list[Tracker] = field(default_factory=list)
    folder: Path = Path()

    @classmethod
    def of(cls, spec: JobSpec, name: str, folder: Path) -> "Tracking":
        """Those that the job asks for; nothing is opened yet."""
        trackers: list[Tracker] = []
        if spec.tracking.tensorboard:
            trackers.append(TensorBoard(folder / TENSORBOARD))
        if spec.tracking.wandb is not None:
            trackers.append(WeightsAndBiases(folder, name, spec))
        return cls(trackers, folder)

    def begin(self, epoch: int) -> None:
        """Start, or go on after ``epoch``."""
        for tracker in self.trackers:
            tracker.begin(epoch)

    def epoch(self, line: Metrics) -> None:
        """Curves below ``train``."""
        for tracker in self.trackers:
            tracker.write(line.epoch, numbers(line, "train"), None)

    def evaluation(self, line: Evaluation) -> None:
        """Curves below ``eval``, and the picture."""
        picture = self.folder / line.grid if line.grid else None
        for tracker in self.trackers:
            tracker.write(line.epoch, numbers(line, "eval"), picture)

    def end(self) -> None:
        """Close all."""
        for tracker in self.trackers:
            tracker.end()
