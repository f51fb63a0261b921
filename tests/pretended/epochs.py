"""Epochs of every family on a pretended device, in a process of their own: see ``device``."""

from pathlib import Path

import pytest
import torch

from tempflow_trainer import loop, main
from tempflow_trainer.data import load_prompts
from tempflow_trainer.loop import Run
from tempflow_trainer.models import families
from tests.pretended import device as pretended
from tests.unit.trainer.family_cases import ALONE, CPU, DIGITS, FLUX, KLEIN, QWEN, SD3, Case

every_family = pytest.mark.parametrize("case", [DIGITS, SD3, FLUX, QWEN, KLEIN], ids=str)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def there() -> torch.device:
    return pretended.make()


def test_the_device_is_another(there: torch.device) -> None:
    one = torch.ones(3).to(there)
    assert one.device == there == torch.zeros(3, device=there).device
    assert float((one + 1).sum()) == 6
    assert (one * 1j).conj().to(CPU).tolist() == [-1j] * 3
    with pytest.raises(pretended.Mixed):
        _ = one + torch.ones(3)


def run_of(case: Case, folders: Path, tuning: str, device: torch.device) -> Run:
    spec = case.spec(folders, "float32", tuning)
    savers = {"gradient_checkpointing": True, "text_cache_mebibytes": 64, "rows_per_decode": 2}
    parts = {
        "compute": spec.compute.model_copy(update=savers),
        # With its usual one Adam makes as much of a gradient that is rounding as of any other.
        "optimizer": spec.optimizer.model_copy(update={"epsilon": 1e-3}),
        "algorithm": spec.algorithm.model_copy(update={"updates_per_epoch": 2}),
    }
    spec = spec.model_copy(update=parts)
    model = families.load(spec.model, cache=folders, device=device)
    return main.build_run(spec, model, load_prompts(spec), ALONE, device, lambda: False)


def moved(run: Run) -> tuple[dict[str, float], torch.Tensor]:
    """What an epoch tells in numbers, and by how much it moves the weights, flat."""
    weights = run.tuning.parameters()
    before = [p.detach().clone() for p in weights.values()]
    metrics = loop.run_epoch(run, 0)
    by = [
        (p.detach() - old).to(CPU).flatten()
        for p, old in zip(weights.values(), before, strict=True)
    ]
    return {k: v for k, v in metrics.items() if not isinstance(v, dict)}, torch.cat(by)


@every_family
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_an_epoch_is_that_of_the_processor(
    case: Case, tuning: str, folders: Path, there: torch.device
) -> None:
    """With everything that saves memory. Equal up to the order of sums, which differs where torch
    has one kernel for several operations on the processor alone."""
    metrics, by = moved(run_of(case, folders, tuning, CPU))
    run = run_of(case, folders, tuning, there)
    assert {p.device for p in run.tuning.parameters().values()} == {there}
    metrics_there, by_there = moved(run)
    assert metrics["kl"] > 0
    assert by.norm() > 0
    assert metrics_there == pytest.approx(metrics, rel=0.01, abs=1e-5)
    assert (by_there - by).norm() < 0.01 * by.norm()
