"""Where a run's files lie, and what makes a checkpoint complete.

::

    <run>/
      run.json                       the resolved job and the version that started it
      checkpoints/step-0000000120-attempt-000001/
        config.json                  the specification of the job
        adapter/                     LoRA in the diffusers form, or
        transformer/                 full weights in the diffusers form; both from the average
        state/                       trained weights, average and optimizer to continue from
        MANIFEST.json                written last, create-only: now the checkpoint exists
      record/                        metrics.jsonl, evaluations.jsonl, grids/, self-test.json,
                                     summary.json

A folder is written once and never changed; the step counts completed epochs.
"""

import re
from typing import Annotated

from pydantic import Field, field_validator

from tempflow_api.base import Section

CHECKPOINTS = "checkpoints"
MANIFEST = "MANIFEST.json"
RECORD = "record"
RUN_FILE = "run.json"
METRICS = f"{RECORD}/metrics.jsonl"
EVALUATIONS = f"{RECORD}/evaluations.jsonl"
SUMMARY = f"{RECORD}/summary.json"
SELF_TEST = f"{RECORD}/self-test.json"
PROGRESS = f"{RECORD}/progress.json"
GRIDS = f"{RECORD}/grids"
ADAPTER = "adapter"
TRANSFORMER = "transformer"
STATE = "state"
CONFIG = "config.json"

_FOLDER = re.compile(r"^step-(\d{10})-attempt-(\d{6})(?:-(\d+))?$")


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
    nonce: str
    """Of the process that wrote it: tells a lost reply from a lost race."""
    world_size: Annotated[int, Field(ge=1)]
    time: str
    files: list[StoredFile]


def folder_name(step: int, attempt: int, save: int = 1) -> str:
    """Folder of the checkpoint after ``step`` epochs; a further save of the same step by the
    same attempt gets a folder of its own."""
    suffix = "" if save == 1 else f"-{save}"
    return f"step-{step:010d}-attempt-{attempt:06d}{suffix}"


def parse_folder(name: str) -> tuple[int, int, int] | None:
    """``(step, attempt, save)`` of a checkpoint's folder, None for any other name."""
    match = _FOLDER.match(name)
    if match is None:
        return None
    step, attempt, save = match.groups(default="1")
    return int(step), int(attempt), int(save)
