"""Where a run's files lie, and which checkpoints count.

::

    <run>/
      run.json                       the job that the run was started as
      ledger/0000000007.json         create-only, numbered: who writes, and what counts
      checkpoints/step-0000000120-attempt-000001/
        config.json                  the specification of the job
        adapter/                     LoRA in the diffusers form, or
        transformer/                 full weights in the diffusers form; both from the average
        state/                       trained weights, average and optimizer to continue from
        MANIFEST.json                written last, create-only: now the checkpoint exists
      pins/step-0000000120-attempt-000001.json     create-only: keep this one
      LATEST.json                    a hint for people; nothing reads it to decide
      record/                        metrics.jsonl, evaluations.jsonl, checkpoints.jsonl,
                                     grids/, logs/, self-test.json, summary.json

A folder is written once and never changed; the step counts completed epochs.

Two starts of a run may be alive at once, so claims and commits share one row of numbers, the
ledger. A start claims the run with the next entry, and commits a checkpoint with the next one after
what it knows. An entry can be created once only, so a start that was taken over finds its number
taken, and stops. The highest entry lists the checkpoints that count; whatever an older start adds
after a newer claim never gets into it. No clock is compared.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from tempflow_api.base import Section

CHECKPOINTS = "checkpoints"
LEDGER = "ledger"
PINS = "pins"
LATEST = "LATEST.json"
MANIFEST = "MANIFEST.json"
RECORD = "record"
RUN_FILE = "run.json"
METRICS = f"{RECORD}/metrics.jsonl"
EVALUATIONS = f"{RECORD}/evaluations.jsonl"
SAVES = f"{RECORD}/checkpoints.jsonl"
SUMMARY = f"{RECORD}/summary.json"
SELF_TEST = f"{RECORD}/self-test.json"
PROGRESS = f"{RECORD}/progress.json"
GRIDS = f"{RECORD}/grids"
LOGS = f"{RECORD}/logs"
ADAPTER = "adapter"
TRANSFORMER = "transformer"
STATE = "state"
CONFIG = "config.json"

_FOLDER = re.compile(r"^step-(\d{10})-attempt-(\d{6})(?:-i(\d{4,}))?(?:-(\d+))?$")
_ENTRY = re.compile(r"^(\d{10})\.json$")


class Incarnation(NamedTuple):
    """One start of a run. A higher one takes the run over from all lower ones."""

    attempt: int
    """The operator counts attempts; a local run has only 0."""
    number: int
    """Start of that attempt, from 1: the pods of an attempt may be started anew."""

    def __str__(self) -> str:
        return f"start {self.number} of attempt {self.attempt}"


class Folder(NamedTuple):
    """A checkpoint's folder, as its name says; sorted as checkpoints of one incarnation are."""

    step: int
    attempt: int
    incarnation: int
    save: int

    @property
    def name(self) -> str:
        return folder_name(*self)

    @property
    def writer(self) -> Incarnation:
        return Incarnation(self.attempt, self.incarnation)


class StoredFile(Section):
    """One file of a checkpoint."""

    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$", max_length=512)]
    """Below the checkpoint's folder."""
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if ".." in path.split("/"):
            raise ValueError("leads out of the checkpoint's folder")
        return path


class CheckpointManifest(Section):
    """The object whose existence makes a checkpoint exist."""

    format: Annotated[int, Field(ge=1)] = 1
    step: Annotated[int, Field(ge=0)]
    """Epochs completed."""
    attempt: Annotated[int, Field(ge=0)]
    incarnation: Annotated[int, Field(ge=1)] = 1
    """Start of the attempt that wrote it."""
    parent: str | None = None
    """The checkpoint before it in this run: a folder's name, or where the run was continued from;
    None if there is none."""
    nonce: str
    """Of this save: tells a lost reply from a lost race."""
    world_size: Annotated[int, Field(ge=1)]
    versions: dict[str, str] = {}
    """Of this project and of the libraries that decide the numbers, by name."""
    time: str
    evaluation: dict[str, float] = {}
    """Mean of each reward, and of their sum as ``reward``, where this step was evaluated."""
    files: list[StoredFile]


class Entry(Section):
    """One entry of the ledger. The highest one says who writes and which checkpoints count."""

    format: Annotated[int, Field(ge=1)] = 1
    number: Annotated[int, Field(ge=1)]
    action: Literal["claim", "commit", "prune"]
    """``prune``: somebody let go of checkpoints, in the name of the owner, who goes on from it."""
    attempt: Annotated[int, Field(ge=0)]
    incarnation: Annotated[int, Field(ge=1)]
    nonce: str
    """Of this entry: tells a lost reply from a lost race."""
    time: str
    resumed_from: str | None = None
    """Of a claim: name of the folder that its owner continues from, or where another run lies."""
    skipped: list[str] = []
    """Of a claim: names of the folders that counted and were damaged, so that its owner went back
    to one before them."""
    committed: list[str] = []
    """Names of the folders that count, newest first. What retention lets go of leaves this list
    before its files are deleted."""

    @property
    def owner(self) -> Incarnation:
        return Incarnation(self.attempt, self.incarnation)


class Latest(Section):
    """What ``LATEST.json`` says: a hint, perhaps an old one."""

    folder: str
    step: Annotated[int, Field(ge=0)]
    time: str


class Pin(Section):
    """What a pin says."""

    time: str
    reason: Annotated[str, Field(max_length=1024)] = ""


def folder_name(step: int, attempt: int, incarnation: int = 1, save: int = 1) -> str:
    """Folder of the checkpoint after ``step`` epochs.

    Each incarnation writes to folders of its own, and a further save of a step to one more.
    """
    start = "" if incarnation == 1 else f"-i{incarnation:04d}"
    suffix = "" if save == 1 else f"-{save}"
    return f"step-{step:010d}-attempt-{attempt:06d}{start}{suffix}"


def parse_folder(name: str) -> Folder | None:
    """What the name of a checkpoint's folder says, None for any other name."""
    match = _FOLDER.match(name)
    if match is None:
        return None
    return Folder(*(int(part) for part in match.groups(default="1")))


def entry_key(number: int) -> str:
    """Where an entry of the ledger lies."""
    return f"{LEDGER}/{number:010d}.json"


def pin_key(folder: str) -> str:
    """The object whose existence keeps the checkpoint in ``folder`` from being deleted."""
    return f"{PINS}/{folder}.json"


def log_key(attempt: int, rank: int) -> str:
    """Where the last lines of a rank's log lie: an older attempt cannot overwrite a newer one's."""
    return f"{LOGS}/attempt-{attempt:06d}-rank-{rank:05d}.log"


def log_heading(time: str) -> str:
    """The line above what one start of the attempt has logged."""
    return f"=== started {time} ==="


def newest_entry(names: Iterable[str]) -> int | None:
    """The highest number in a listing of the ledger (names or keys); None if nobody ever claimed
    the run."""
    matches = (_ENTRY.match(name.rpartition("/")[2]) for name in names)
    return max((int(match[1]) for match in matches if match is not None), default=None)


def committed(complete: Iterable[str], newest: Entry | None) -> list[Folder]:
    """The checkpoints that count, newest first.

    Args:
        complete: names of the folders that have a manifest.
        newest: the highest entry of the ledger; None where nobody ever claimed the run, for
            instance in a copy of its checkpoints only: then every complete one counts.
    """
    found = sorted(
        (folder for name in complete if (folder := parse_folder(name)) is not None), reverse=True
    )
    if newest is None:
        return found
    there = {folder.name: folder for folder in found}
    return [there[name] for name in newest.committed if name in there]
