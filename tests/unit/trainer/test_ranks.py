"""One process, two and four learn the same: the whole trainer in each of them."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.errors import Preempted
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.main import train
from tests.numerics.toys import ALONE, spec_of
from tests.unit.trainer.sessions import epochs, final_state, in_forks, rows

# Three groups an update: two processes cannot share them evenly.
JOB: dict[str, object] = {
    "model.tuning": "lora",
    "model.lora": {"rank": 4, "alpha": 8},
    "model.ema": {"decay": 0.9, "everyUpdates": 1},
    "data.prompts": ["a one", "a two", "a three"],
    "algorithm.epochs": 2,
    "algorithm.promptsPerEpoch": 6,
    "algorithm.seedsPerPrompt": 1,
    "algorithm.updatesPerEpoch": 2,
    "algorithm.klCoefficient": 0.01,
    "algorithm.advantage": {"scope": "prompt", "deviation": "global"},
    "rewards": [
        {"name": "digit-log-probability"},
        {"name": "digit-ink", "weight": 4.0},
        {"name": "digit-judge", "weight": 0.0},
    ],
    "evaluation": {"steps": 4, "prompts": 3, "imagesPerPrompt": 3, "everyEpochs": 2},
    # Two processes sum something before they learn, which changes nothing.
    "compute.preflight": True,
}


def job_of(changes: dict[str, object]) -> TempFlowGRPOJob:
    return TempFlowGRPOJob.model_validate(
        {
            "apiVersion": naming.API_VERSION,
            "kind": naming.KIND,
            "metadata": {"name": "demo"},
            "spec": spec_of({**JOB, **changes}),
        }
    )


def work_of(folder: Path) -> Path:
    """A run keeps its checkpoints beside its work, under its own name."""
    return folder / "demo"


def in_this_process(
    folder: Path,
    changes: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    *,
    questions: float = float("inf"),
) -> None:
    """One attempt, asked to stop from the given question on."""
    monkeypatch.setenv(naming.ENV_WORK_DIR, str(work_of(folder)))
    asked = count()
    train(job_of(changes), ALONE, lambda: next(asked) >= questions, LogTail(0, 0))


def assert_close(one: object, other: object, tolerance: float) -> None:
    """Equal structure, and numbers equal up to the tolerance."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key], tolerance)
    elif isinstance(one, float | int) and not isinstance(one, bool):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
    else:
        assert one == other


# Adam divides a gradient by its own size, so where one cancels out, its rounding error becomes a
# step of full length; on some processors that is 2e-6 in one parameter of thousands.
DAMPED: dict[str, object] = {"optimizer.epsilon": 1e-4}
# Six groups an update, which four processes cannot share evenly; chance decides the steps.
SIX_GROUPS: dict[str, object] = {
    "algorithm.seedsPerPrompt": 2,
    "algorithm.advantage": {"scope": "seed", "deviation": "group", "epsilon": 1e-2},
    "algorithm.branchSet": {"choose": "random", "count": 2},
    "algorithm.weighting": "guard",
    # So that a run of one epoch evaluates when a longer one does.
    "evaluation": {"steps": 4, "prompts": 3, "imagesPerPrompt": 3, "everyEpochs": 1},
}


def shared(processes: int) -> dict[str, object]:
    return {"compute.processesPerNode": processes}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "changes"),
    [([2], DAMPED), ([4, 2], SIX_GROUPS)],
    ids=["two", "four, then two"],
)
def test_several_processes_learn_what_one_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: list[int],
    changes: dict[str, object],
) -> None:
    """All epochs; or one with the first number of processes, and the rest with the second."""
    in_this_process(tmp_path / "one", changes, monkeypatch)
    one, two = work_of(tmp_path / "one"), work_of(tmp_path / "several")
    *earlier, last = processes
    starts = [(job_of({**changes, **shared(n), "algorithm.epochs": 1}), n, two) for n in earlier]
    starts.append((job_of({**changes, **shared(last)}), last, two))
    in_forks(tmp_path / "several", starts)
    for name in (layout.METRICS, layout.EVALUATIONS):
        for mine, theirs in zip(rows(one, name), rows(two, name), strict=True):
            assert_close(mine, theirs, 1e-5)
    one_state, two_state = final_state(one), final_state(two)
    for part in ("trained", "average", "optimizer"):  # with the gradients, as means and squares
        values, others = getattr(one_state, part), getattr(two_state, part)
        assert values.keys() == others.keys()
        for key in values:
            torch.testing.assert_close(values[key], others[key], rtol=0, atol=1e-6)
    summaries = [json.loads((work / layout.SUMMARY).read_text()) for work in (one, two)]
    for key in ("evaluations", "images"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_digits_model_goes_on_after_a_stop_as_if_there_was_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuning: str
) -> None:
    changes: dict[str, object] = {"algorithm.epochs": 4}
    if tuning == "full":
        changes |= {"model.tuning": "full", "model.lora": None}
    in_this_process(tmp_path / "whole", changes, monkeypatch)
    with pytest.raises(Preempted, match="stopped after 2 of 4 epochs"):
        in_this_process(tmp_path / "parts", changes, monkeypatch, questions=8)
    in_this_process(tmp_path / "parts", changes, monkeypatch)
    folders = work_of(tmp_path / "whole"), work_of(tmp_path / "parts")
    whole, parts = (final_state(folder) for folder in folders)
    for part in ("trained", "average", "optimizer"):
        mine, theirs = getattr(whole, part), getattr(parts, part)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), part
    assert epochs(folders[1], layout.METRICS) == [1, 2, 3, 4]
    for name in (layout.METRICS, layout.EVALUATIONS):
        assert rows(folders[0], name) == rows(folders[1], name)
