"""Whole runs in this process, on a toy: seconds become milliseconds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempflow_api import checkpoint_layout as layout
from tempflow_api.retention import Retention
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.main import evaluator_of
from tempflow_trainer.metrics import Record
from tempflow_trainer.session import Session
from tempflow_trainer.store import FolderStore
from tests.numerics.toys import prompts_of, run_of

ROOT = Path(__file__).parents[3]
Rows = list[dict[str, Any]]
# What differs between two runs that learn the same.
OF_THE_CLOCK = {"time", "seconds", "scoringHiddenSeconds", "imagesPerSecond"}


def never() -> bool:
    return False


def after(calls: int) -> Callable[[], bool]:
    """Asks to stop from the given question on; an epoch asks three times, an evaluation before
    each of its calls."""
    asked: list[None] = []

    def stop_requested() -> bool:
        asked.append(None)
        return len(asked) > calls

    return stop_requested


def session_of(
    spec: JobSpec,
    folder: Path,
    *,
    stop_requested: Callable[[], bool] = never,
    announce: Callable[[Progress], None] = lambda _progress: None,
    attempt: int = 0,
    store: Path | None = None,
) -> Session:
    """One attempt of a run that keeps everything in ``folder``, or its checkpoints elsewhere."""
    run = replace(run_of(spec), stop_requested=stop_requested)
    staging = folder / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    return Session(
        spec=spec,
        run=run,
        evaluator=evaluator_of(spec, run, prompts_of(spec)),
        checkpoints=Checkpoints(
            FolderStore(store or folder),
            staging,
            attempt,
            world_size=1,
            retention=Retention.of(spec.checkpoint),
        ),
        record=Record(folder),
        announce=announce,
    )


def rows(folder: Path, name: str) -> Rows:
    """Lines of a record, as strict JSON, without what the clock has a part in."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    lines = (folder / name).read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{k: v for k, v in row.items() if k not in OF_THE_CLOCK} for row in found]


def epochs(folder: Path, name: str) -> list[int]:
    return [row["epoch"] for row in rows(folder, name)]


def final_state(folder: Path) -> State:
    """What the newest checkpoint of the run holds."""
    checkpoints = Checkpoints(FolderStore(folder), folder / "staging", 0, 1, Retention(2))
    newest = checkpoints.newest_sound()
    assert newest is not None
    return checkpoints.load(newest)


def in_forks(folder: Path, jobs: Sequence[tuple[TempFlowGRPOJob, int, Path]]) -> None:
    """Train each job in its work folder, by so many processes, one after the other; ``folder`` is
    for what they are told."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = []
    for number, (job, processes, work) in enumerate(jobs):
        file = folder / f"job-{number}.json"
        file.write_text(job.model_dump_json(by_alias=True))
        plan.append((processes, str(file), str(work)))
    listed = folder / "plan.json"
    listed.write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.trainer.forked_ranks", str(listed)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / layout.CHECKPOINTS).iterdir())
