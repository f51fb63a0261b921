"""A real process that claims a run and saves checkpoints, to be paused and killed.

It is forked from a process that has everything imported, so it starts in a moment.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import TempFlowError
from tempflow_api.retention import Retention
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.store import S3Store
from tempflow_trainer.store_base import Store

ADAPTER = f"{layout.ADAPTER}/weights"


def state(step: int) -> State:
    """Of a size that is sent in one request a file."""
    values = {"a": torch.full((8,), float(step))}
    return State(step, step, values, values, {"exp_avg/a": values["a"]}, {})


def export(folder: Path) -> None:
    (folder / layout.ADAPTER).mkdir()
    (folder / ADAPTER).write_bytes(b"weights")


def export_large(folder: Path) -> None:
    """It is sent in three parts."""
    export(folder)
    (folder / ADAPTER).write_bytes(bytes(33 << 20))


@cache
def _bucket(endpoint: str, name: str) -> S3Store:
    # A client takes half a second to make; a test should not make three.
    return S3Store(f"s3://{name}", endpoint_url=endpoint, region="us-east-1")


def store(endpoint: str, uri: str) -> Store:
    """The store of a run, ``s3://bucket/run``."""
    bucket, _, run = uri.removeprefix("s3://").partition("/")
    return _bucket(endpoint, bucket).below(run)


def start(endpoint: str, uri: str, staging: Path, attempt: int = 1) -> Checkpoints:
    """A start of the run: it has claimed it."""
    staging.mkdir(exist_ok=True)
    made = Checkpoints(store(endpoint, uri), staging, attempt, world_size=1, retention=Retention(2))
    made.begin()
    return made


def save(
    endpoint: str, uri: str, staging: Path, steps: Sequence[int], export: Callable[[Path], None]
) -> None:
    """Claim and save; ends with the exit code of what went wrong."""
    try:
        run = start(endpoint, uri, staging)
        for step in steps:
            run.save(state(step), export)
    except TempFlowError as error:
        raise SystemExit(int(error.exit_code)) from error


def process(
    endpoint: str,
    uri: str,
    staging: Path,
    steps: Sequence[int],
    export: Callable[[Path], None] = export,
) -> BaseProcess:
    """The process, not started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.writer"])
    return context.Process(target=save, args=(endpoint, uri, staging, steps, export), daemon=True)
