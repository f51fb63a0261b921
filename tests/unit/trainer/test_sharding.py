"""Weights in parts: the same training on two processes, whichever way they share it."""

import json
import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.errors import Preempted
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tempflow_trainer import loop, main, sharding
from tempflow_trainer.data import load_prompts
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.main import train
from tempflow_trainer.models import families
from tempflow_trainer.models.tuning import LORA_FILE, FullTuning
from tempflow_trainer.rollout import Rollouts, Walker
from tests.numerics.toys import ALONE
from tests.unit.trainer.family_cases import CPU, FLUX, KLEIN, QWEN, SD3, Case
from tests.unit.trainer.sessions import Rows, final_state, in_forks, rows
from tests.unit.trainer.test_ranks import assert_close, job_of

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
# FLUX has two lists of blocks, Qwen-Image a mask among its inputs.
FAMILIES = [FLUX, QWEN]


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
        """Two processes train each of them."""
        in_forks(self.folder, [(found, 2, self[name]) for name, found in jobs.items()])


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
    for case in FAMILIES:
        alone(case.job(found.folder, epochs=2), found[f"{case} alone"])
        for strategy in ("replicate", "shard"):
            two = {"strategy": strategy, "processes_per_node": 2}
            jobs[f"{case} {strategy}"] = case.job(found.folder, epochs=2, **two)
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


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_other_networks_are_shared_as_well(runs: Runs, case: Case, strategy: str) -> None:
    one, other = runs[f"{case} alone"], runs[f"{case} {strategy}"]
    mine, theirs = numbers(one, layout.METRICS), numbers(other, layout.METRICS)
    for row, another in zip(mine, theirs, strict=True):
        assert_close(row, another, SAME_NUMBERS)
    expected, found = final_state(one).trained, final_state(other).trained
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=SAME_WEIGHTS)


def as_one_of_two(test: Callable[[Ranks], None]) -> None:
    """Run ``test`` as the first of two ranks whose peer is pretended; in a fork, for torch ends a
    process that had such a group by an abort now and then."""
    process = os.fork()
    if process == 0:
        try:
            dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
            test(Ranks(rank=0, world=2, local_rank=0))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.parametrize("case", [SD3, FLUX, QWEN, KLEIN], ids=str)
def test_no_network_is_whole_where_it_is_trained(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit is widened and sent when all units before it are in parts: of a network that is too
    large for a device, and of the one before training, one block at a time is there."""
    spec = case.spec(tmp_path, precision="bfloat16", tuning="full")
    compute = spec.compute.model_copy(update={"strategy": "shard", "processes_per_node": 2})
    spec = spec.model_copy(update={"compute": compute})
    model = case.load(tmp_path, "bfloat16")
    most = {"float32": 0.0}
    total = sum(p.numel() for p in model.transformer.parameters())
    networks: set[int] = set()

    def watch(unit: nn.Module, **given: object) -> None:
        whole = [p for p in unit.parameters() if not isinstance(p, DTensor)]
        assert {p.dtype for p in whole} == {torch.float32}
        most["float32"] = max(most["float32"], sum(p.numel() for p in whole) / total)
        networks.add(id(unit))
        really(unit, **given)

    really: Any = fully_shard
    monkeypatch.setattr(sharding, "fully_shard", watch)
    blocks = [b for c in model.transformer.children() if isinstance(c, nn.ModuleList) for b in c]

    def build(ranks: Ranks) -> None:
        run = main.build_run(spec, model, load_prompts(spec), ranks, CPU, lambda: False)
        assert len(networks) == 2 * (len(blocks) + 1)  # with the network before training
        assert most["float32"] < 0.7
        held = [p for network in run.tuning.networks() for p in network.parameters()]
        assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in held)
        assert len({sharding.part(p).untyped_storage().data_ptr() for p in held}) == len(held)

    as_one_of_two(build)


def test_the_network_before_training_takes_no_memory_until_it_is_in_parts(tmp_path: Path) -> None:
    """Of the host, on which every process of a node maps the same files."""
    model = SD3.load(tmp_path, "bfloat16")
    places = {p.data_ptr() for p in model.transformer.parameters()}
    tuning = FullTuning(model, keep_reference=True, to_be_sharded=True)
    for network in tuning.networks():
        assert {p.data_ptr() for p in network.parameters()} == places
    trained, before = tuning.networks()
    assert all(p.requires_grad for p in trained.parameters())
    assert not any(p.requires_grad for p in before.parameters())


@pytest.mark.parametrize("cached", [True, False])
def test_the_rest_of_a_model_follows_to_the_device(tmp_path: Path, cached: bool) -> None:
    model = SD3.load(tmp_path)
    model.move_rest(torch.device("meta"), text_encoders=not cached)
    assert model.transformer.device == CPU
    assert model.pipeline.vae.device.type == "meta"
    devices = {next(encoder.parameters()).device.type for encoder in model.text_encoders()}
    assert devices == {"cpu" if cached else "meta"}


@pytest.mark.parametrize(("strategy", "place"), [("shard", "cpu"), ("replicate", "meta")])
def test_a_model_is_loaded_where_it_fits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    place: str,
) -> None:
    """On the host where each device holds a part of it."""

    def load(_model: object, *, device: torch.device, **_: object) -> None:
        raise InterruptedError(device.type)

    monkeypatch.setenv(naming.ENV_WORK_DIR, str(tmp_path / "demo"))
    monkeypatch.setattr(main, "device_of", lambda _spec, _local_rank: torch.device("meta"))
    monkeypatch.setattr(families, "load", load)
    found = job({**LORA, "compute.preflight": False}, strategy, 2)

    def start(ranks: Ranks) -> None:
        with pytest.raises(InterruptedError, match=place):
            train(found, ranks, lambda: False, LogTail(0, 0))

    as_one_of_two(start)


def test_a_rollout_exchanges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no process waits for another one's slower images."""
    spec = SD3.spec(tmp_path)
    counted: list[int] = []

    def watch(walker: Walker, *given: Any) -> Rollouts:
        with CommDebugMode() as seen:
            found = collect(walker, *given)
        counted.append(seen.get_total_counts())
        return found

    collect = Walker.collect
    monkeypatch.setattr(Walker, "collect", watch)
    model = SD3.load(tmp_path)
    prompts = load_prompts(spec)

    def draw(ranks: Ranks) -> None:
        with CommDebugMode() as voted:
            assert ranks.any(True)
        assert voted.get_total_counts() == 1
        run = main.build_run(spec, model, prompts, ranks, CPU, lambda: bool(counted))
        with pytest.raises(Preempted):
            loop.run_epoch(run, 0)
        assert counted == [0]

    as_one_of_two(draw)
