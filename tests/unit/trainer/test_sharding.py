"""Weights in parts: the same training on two processes, whichever way they share it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.main import train
from tempflow_trainer.models.tuning import LORA_FILE
from tests.numerics.toys import ALONE
from tests.unit.trainer.sessions import Rows, final_state, rows
from tests.unit.trainer.test_ranks import assert_close, job_of

ROOT = Path(__file__).parents[3]
# Float32 sums in another order, through five updates of AdamW.
SAME_WEIGHTS = 1e-5
SAME_NUMBERS = 1e-4
LORA: dict[str, object] = {
    "algorithm.epochs": 5,
    "algorithm.promptsPerEpoch": 4,
    "algorithm.updatesPerEpoch": 1,
    # Small enough to be felt.
    "optimizer": {"learningRate": 1e-3, "maxGradNorm": 1e-3},
    # Five images: the second process has one less to draw, and fills up.
    "evaluation": {"steps": 3, "prompts": 1, "imagesPerPrompt": 5, "everyEpochs": 3},
    "checkpoint.everyEpochs": 5,
}
FULL: dict[str, object] = {**LORA, "model.tuning": "full", "model.lora": None}
# As large models are trained: frozen weights in half, and all that saves memory.
HALF: dict[str, object] = {
    **LORA,
    "model.precision": "bfloat16",
    "compute.gradientCheckpointing": True,
    "compute.textCacheMebibytes": 1,
    "algorithm.epochs": 2,
    # The rounding of bfloat16 is wider than the clip range of the example: the self-test says so.
    "algorithm.clipRange": 0.05,
}
SHORT: dict[str, object] = {"algorithm.epochs": 3}


def job(tuning: dict[str, object], strategy: str, processes: int) -> TempFlowGRPOJob:
    compute = {"compute.strategy": strategy, "compute.processesPerNode": processes}
    return job_of({**tuning, **compute})


def alone(found: TempFlowGRPOJob, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(naming.ENV_WORK_DIR, str(folder))
        train(found, ALONE, lambda: False, LogTail(0, 0))


@dataclass(frozen=True)
class Runs:
    """Folders by the name of the run."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name / "demo"

    def together(self, jobs: dict[str, TempFlowGRPOJob]) -> None:
        """Two processes train them in turn."""
        listed = []
        for number, (name, found) in enumerate(jobs.items()):
            file = self.folder / f"job-{number}.json"
            file.write_text(found.model_dump_json(by_alias=True))
            listed.append((str(file), str(self[name])))
        plan = self.folder / "plan.json"
        plan.write_text(json.dumps(listed))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "tests.unit.trainer.rank_of_many", str(plan)]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("runs"))
    for name, tuning in (("lora", LORA), ("full", FULL)):
        alone(job(tuning, "replicate", 1), found[f"{name} alone"])
        alone(job({**tuning, **SHORT}, "replicate", 1), found[f"{name} from one to two"])
    alone(job(HALF, "replicate", 1), found["half alone"])
    jobs = {"half shard": job(HALF, "shard", 2)}
    for name, tuning in (("lora", LORA), ("full", FULL)):
        for strategy in ("replicate", "shard"):
            jobs[f"{name} {strategy}"] = job(tuning, strategy, 2)
        jobs[f"{name} from one to two"] = job(tuning, "shard", 2)
        jobs[f"{name} from two to one"] = job({**tuning, **SHORT}, "shard", 2)
    found.together(jobs)
    for name, tuning in (("lora", LORA), ("full", FULL)):
        alone(job(tuning, "replicate", 1), found[f"{name} from two to one"])
    return found


pytestmark = pytest.mark.slow
each_tuning = pytest.mark.parametrize("tuning", ["lora", "full"])


def numbers(folder: Path, name: str) -> Rows:
    """Of all epochs, without the network's rows, of which filling up makes more."""
    return [{k: v for k, v in row.items() if k != "evaluations"} for row in rows(folder, name)]


@each_tuning
@pytest.mark.parametrize("way", ["replicate", "shard", "from one to two", "from two to one"])
def test_all_ways_learn_the_same(runs: Runs, tuning: str, way: str) -> None:
    """Five updates, each with a gradient that is clipped; the continued ones after three."""
    one, other = runs[f"{tuning} alone"], runs[f"{tuning} {way}"]
    for name in (layout.METRICS, layout.EVALUATIONS):
        mine, theirs = numbers(one, name), numbers(other, name)
        if name == layout.EVALUATIONS:  # a run that ends at three evaluates there
            mine, theirs = mine[-1:], theirs[-1:]
        for row, another in zip(mine, theirs, strict=True):
            assert_close({**row, "grid": None}, {**another, "grid": None}, SAME_NUMBERS)
    norms = [row["gradNorm"] for row in rows(one, layout.METRICS)]
    assert len(norms) == 5
    assert min(norms) > 1e-3
    expected, found = final_state(one), final_state(other)
    for part in ("trained", "average", "optimizer"):
        values, others = getattr(expected, part), getattr(found, part)
        assert values.keys() == others.keys()
        for key in values:
            torch.testing.assert_close(others[key], values[key], rtol=0, atol=SAME_WEIGHTS)


def test_half_precision_is_shared_too(runs: Runs) -> None:
    """One unit then has weights of two types. Rounding to 8 bits leaves the direction."""
    one, two = final_state(runs["half alone"]), final_state(runs["half shard"])
    first = next(iter(one.trained))
    assert {value.dtype for value in two.trained.values()} == {torch.float32}
    assert two.trained[first].shape == one.trained[first].shape
    norms = [
        [row["gradNorm"] for row in rows(runs[f"half {way}"], layout.METRICS)]
        for way in ("alone", "shard")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


@each_tuning
def test_the_result_is_whole(runs: Runs, tuning: str) -> None:
    """The file of a sharded run has the names, shapes and values of one process's."""
    files = []
    for name in ("alone", "shard"):
        folder = max((runs[f"{tuning} {name}"] / layout.CHECKPOINTS).iterdir())
        [file] = list(folder.glob("adapter/*.safetensors")) + list(
            folder.glob("transformer/*.safetensors")
        )
        files.append(load_file(file))
        if tuning == "lora":
            assert file.name == LORA_FILE
        else:
            config = json.loads((file.parent / "config.json").read_text())
            assert config["_class_name"] == "SD3Transformer2DModel"
    one, sharded = files
    assert one.keys() == sharded.keys()
    for key in one:
        torch.testing.assert_close(sharded[key], one[key], rtol=0, atol=SAME_WEIGHTS)


@each_tuning
def test_each_process_holds_about_half(runs: Runs, tuning: str) -> None:
    """Also of the model before training, with which full tuning compares."""
    for rank in range(2):
        told = (runs[f"{tuning} shard"] / f"rank-{rank}.log").read_text()
        held = [(int(a), int(b)) for a, b in re.findall(r"holds (\d+) of (\d+) bytes", told)]
        assert len(held) == (2 if tuning == "full" else 1)
        for here, everywhere in held:
            assert everywhere > 250_000
            assert here < 0.6 * everywhere
