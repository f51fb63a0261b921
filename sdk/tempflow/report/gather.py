"""What a report is made of, read from a run's folder or store."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tempflow import checkpoints
from tempflow.checkpoints import Step, Store
from tempflow.refused import Refused
from tempflow_api import checkpoint_layout as layout
from tempflow_api.record import Evaluation, Metrics, Save, SelfTest, Summary
from tempflow_api.v1alpha1 import JobSpec

_Line = TypeVar("_Line", bound=BaseModel)
GRIDS_SHOWN = 12
MOST_ENTRIES = 500
"""Of the ledger, the newest: each is a request."""
MOST_LOGS = 64
"""Files with the last lines of a rank that are shown, those of the newest attempts."""


@dataclass(frozen=True)
class Grid:
    """The picture of an evaluation."""

    epoch: int
    png: bytes


@dataclass(frozen=True)
class Log:
    """The last lines of a rank."""

    name: str
    text: str


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run has told about itself."""

    name: str
    uri: str
    spec: JobSpec | None
    """None where the job was written by a version that this one cannot read."""
    metrics: list[Metrics]
    evaluations: list[Evaluation]
    summary: Summary | None
    """None while the run is under way, and after one that did not reach its end."""
    steps: list[Step]
    grids: list[Grid] = field(default_factory=list)
    grids_left_out: int = 0
    saves: list[Save] = field(default_factory=list)
    self_test: SelfTest | None = None
    claims: list[layout.Entry] = field(default_factory=list)
    """The starts of the run, oldest first."""
    logs: list[Log] = field(default_factory=list)


def gather(store: Store) -> RunRecord:
    """Read the record of a run.

    Raises:
        Refused: nothing that looks like a run is there.
        StoreUnavailable: the store cannot be read.
    """
    metrics = _lines(Metrics, checkpoints.read(store, layout.METRICS))
    evaluations = _lines(Evaluation, checkpoints.read(store, layout.EVALUATIONS))
    if not metrics and not evaluations:
        raise Refused(
            f"no record of a run at {store.uri}: expects the folder of a run, which holds "
            f"{layout.METRICS} once its first evaluation is done"
        )
    pictured = [one for one in evaluations if one.grid]
    shown = selection(pictured, GRIDS_SHOWN)
    return RunRecord(
        name=PurePosixPath(store.root).name,
        uri=store.uri,
        spec=_whole(JobSpec, checkpoints.read(store, layout.RUN_FILE)),
        metrics=metrics,
        evaluations=evaluations,
        summary=_whole(Summary, checkpoints.read(store, layout.SUMMARY)),
        steps=checkpoints.steps(store),
        grids=[grid for one in shown if (grid := _grid(store, one))],
        grids_left_out=len(pictured) - len(shown),
        saves=_lines(Save, checkpoints.read(store, layout.SAVES)),
        self_test=_whole(SelfTest, checkpoints.read(store, layout.SELF_TEST)),
        claims=_claims(store),
        logs=_logs(store),
    )


def _claims(store: Store) -> list[layout.Entry]:
    names = sorted(n for n in checkpoints.names(store, layout.LEDGER) if layout.newest_entry([n]))
    found = [
        _whole(layout.Entry, checkpoints.read(store, f"{layout.LEDGER}/{name}"))
        for name in names[-MOST_ENTRIES:]
    ]
    return [entry for entry in found if entry and entry.action == "claim"]


def _logs(store: Store) -> list[Log]:
    names = sorted(n for n in checkpoints.names(store, layout.LOGS) if n.endswith(".log"))
    texts = [
        (name, checkpoints.read(store, f"{layout.LOGS}/{name}")) for name in names[-MOST_LOGS:]
    ]
    return [
        Log(name.removesuffix(".log"), text.decode("utf-8", "replace"))
        for name, text in texts
        if text
    ]


def selection(items: Sequence[_Line], most: int) -> list[_Line]:
    """At most ``most`` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _grid(store: Store, evaluation: Evaluation) -> Grid | None:
    # The path stands in a file that anybody may have written: it must not lead elsewhere.
    path = PurePosixPath(evaluation.grid or "")
    if path.parent != PurePosixPath(layout.GRIDS):
        return None
    png = checkpoints.read(store, str(path))
    return Grid(evaluation.epoch, png) if png else None


def _lines(model: type[_Line], text: bytes | None) -> list[_Line]:
    """Whole lines that this version understands; the last one may be half written."""
    found = []
    for line in (text or b"").splitlines():
        try:
            found.append(model.model_validate_json(line))
        except ValidationError:
            continue
    return found


def _whole(model: type[_Line], text: bytes | None) -> _Line | None:
    try:
        return model.model_validate_json(text) if text else None
    except ValidationError:
        return None
