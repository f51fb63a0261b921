"""A real step of every family on a GPU. Without one these tests fail: they were asked for."""

from pathlib import Path

import pytest
import torch

from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import loop, main
from tempflow_trainer.data import load_prompts
from tempflow_trainer.models import families
from tempflow_trainer.models.base import FlowModel
from tests.unit.trainer.family_cases import (
    ALONE,
    CPU,
    DIGITS,
    FLUX,
    KLEIN,
    PROMPTS,
    QWEN,
    SD3,
    Case,
    starts,
)

pytestmark = pytest.mark.gpu
every_family = pytest.mark.parametrize("case", [DIGITS, SD3, FLUX, QWEN, KLEIN], ids=str)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The first GPU, shown to compute."""
    device = torch.device("cuda", 0)
    assert float(torch.ones(8, device=device).sum()) == 8
    return device


def spec_on_gpu(case: Case, folders: Path, tuning: str, **compute: object) -> JobSpec:
    spec = case.spec(folders, "bfloat16", tuning)
    return spec.model_copy(
        update={"compute": spec.compute.model_copy(update={"device": "cuda", **compute})}
    )


def load(case: Case, folders: Path, device: torch.device, precision: str) -> FlowModel:
    return families.load(case.spec(folders, precision).model, cache=folders, device=device)


@every_family
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_an_epoch_trains(case: Case, tuning: str, folders: Path, gpu: torch.device) -> None:
    """With everything that saves memory."""
    spec = spec_on_gpu(
        case,
        folders,
        tuning,
        gradient_checkpointing=True,
        text_cache_mebibytes=64,
        rows_per_decode=2,
    )
    model = families.load(spec.model, cache=folders, device=gpu)
    run = main.build_run(spec, model, load_prompts(spec), ALONE, gpu, lambda: False)
    before = {name: p.detach().clone() for name, p in run.tuning.parameters().items()}
    metrics = loop.run_epoch(run, 0)
    after = run.tuning.parameters()
    assert all(p.device.type == "cuda" and p.dtype == torch.float32 for p in after.values())
    assert all(bool(p.isfinite().all()) for p in after.values())
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    assert metrics["gradNorm"] > 0
    assert {str(p.device) for e in model.text_encoders() for p in e.parameters()} == {"cpu"}


@every_family
def test_an_image_is_that_of_the_cpu(case: Case, folders: Path, gpu: torch.device) -> None:
    """In float32, up to the order of sums."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    images = []
    for device in (CPU, gpu):
        model = load(case, folders, device, "float32")
        spec = case.spec(folders)
        run = main.build_run(spec, model, load_prompts(spec), ALONE, device, lambda: False)
        latents = run.walker.sample(starts(model, *case.size()), run.policy.text.encode(PROMPTS))
        images.append(run.policy.decode(latents))
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-3)


def test_encoders_that_leave_give_their_memory_back(folders: Path, gpu: torch.device) -> None:
    spec = spec_on_gpu(QWEN, folders, "lora", text_cache_mebibytes=64)
    model = families.load(spec.model, cache=folders, device=gpu)
    before = torch.cuda.memory_allocated(gpu)
    held = sum(p.numel() * p.element_size() for e in model.text_encoders() for p in e.parameters())
    run = main.build_run(spec, model, load_prompts(spec), ALONE, gpu, lambda: False)
    run.policy.text.encode(PROMPTS)
    trained = sum(2 * p.numel() * 4 for p in run.tuning.parameters().values())  # and its average
    assert torch.cuda.memory_allocated(gpu) < before - held + trained + 2**20
