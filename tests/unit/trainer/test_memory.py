"""What saves memory saves it, and changes nothing else: measured in bytes and calls."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempflow_api.errors import ExitCode
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import loop, main
from tempflow_trainer.data import load_prompts
from tempflow_trainer.loop import Run
from tempflow_trainer.metrics import Stopwatch
from tempflow_trainer.models.base import Conditioning, FlowModel
from tempflow_trainer.models.text_cache import TextCache
from tests.numerics.toys import Gaussian
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def changed(spec: JobSpec, **sections: dict[str, object]) -> JobSpec:
    found = spec.model_dump()
    for section, fields in sections.items():
        found[section] |= fields
    return JobSpec.model_validate(found)


def run_of(case: Case, folders: Path, **sections: dict[str, object]) -> tuple[FlowModel, Run]:
    spec = changed(case.spec(folders), **sections)
    model = case.load(folders, spec.model.precision)
    run = main.build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)
    torch.manual_seed(0)
    factors = {n: 0.1 * torch.randn_like(p) for n, p in run.tuning.parameters().items()}
    run.tuning.assign(factors)  # at none, half of the gradients would be zero
    return model, run


def gradient(run: Run) -> Tensor:
    """Of one update, and unclipped."""
    run.max_grad_norm = 1e9
    loop.run_epoch(run, 0)
    found = [p.grad.flatten() for p in run.tuning.parameters().values() if p.grad is not None]
    return torch.cat(found)


def kept_for_the_backward(model: FlowModel) -> int:
    """Bytes of activations between a forward and its backward."""
    own = {p.untyped_storage().data_ptr() for p in model.transformer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = DIGITS.size()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x, sigma = starts(model, *size, count=8), torch.linspace(0.1, 0.9, 8)
        index = torch.arange(8) % 2
        out = model.velocity(x, sigma, model.encode(PROMPTS).rows(index))
        assert out.requires_grad
    return sum(kept.values())


def test_checkpointing_keeps_a_fraction_for_the_same_gradient(folders: Path) -> None:
    found = {}
    for switch in (False, True):
        model, run = run_of(DIGITS, folders, compute={"gradient_checkpointing": switch})
        found[switch] = gradient(run), kept_for_the_backward(model)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-4, atol=1e-8)
    assert found[True][1] < found[False][1] / 3


@pytest.mark.parametrize("case", [SD3, FLUX, QWEN, KLEIN], ids=str)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_what_is_frozen_takes_half_in_half_precision(
    case: Case, precision: str, folders: Path
) -> None:
    """What is trained stays float32, and in float16 one product of T5's, which would overflow."""

    def frozen(kind: str) -> dict[str, int]:
        model, _ = run_of(case, folders, model={"precision": kind})
        parts = [model.transformer, model.pipeline.vae, *model.text_encoders()]
        return {
            f"{type(part).__name__} {number} {name}": p.numel() * p.element_size()
            for number, part in enumerate(parts)
            for name, p in part.named_parameters()
            if not p.requires_grad
        }

    whole, half = frozen("float32"), frozen(precision)
    kept = {name for name in whole if half[name] != whole[name] / 2}
    overflows = {name for name in whole if name.startswith("T5") and name.endswith("wo.weight")}
    assert kept == (overflows if precision == "float16" else set())


def test_float16_has_the_gradient_of_float32(folders: Path) -> None:
    """Whose parts are below what float16 can hold, unless they are scaled."""
    # Rewards that hardly differ, seen through a large epsilon: tiny advantages, no divergence.
    tiny = {"advantage": {"epsilon": 10.0}, "kl_coefficient": 0.0}
    found = {}
    for precision, scaled in (("float32", False), ("float16", True), ("float16", False)):
        _, run = run_of(SD3, folders, model={"precision": precision}, algorithm=tiny)
        assert run.half_range == (precision == "float16")
        run.half_range = scaled
        found[precision, scaled] = gradient(run)
    exact = found["float32", False]
    error = {
        scaled: float((found["float16", scaled] - exact).norm() / exact.norm())
        for scaled in (True, False)
    }
    assert error[True] < 0.1
    assert error[False] > 0.3


def calls_of(module: nn.Module) -> list[int]:
    """Rows of each call from now on."""
    rows: list[int] = []

    def note(_module: nn.Module, args: Sequence[Any], given: dict[str, Any]) -> None:
        first = args[0] if args else given["input_ids"]
        rows.append(len(first))

    module.register_forward_pre_hook(note, with_kwargs=True)
    return rows


def test_a_prompt_of_many_epochs_is_encoded_once(folders: Path) -> None:
    calls, gradients = {}, {}
    for mebibytes in (0, 1):
        spec = changed(SD3.spec(folders), compute={"text_cache_mebibytes": mebibytes})
        model = SD3.load(folders)
        rows = calls_of(model.text_encoders()[2])
        run = main.build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)
        gradients[mebibytes] = gradient(run)
        for epoch in (1, 2):
            loop.run_epoch(run, epoch)
        calls[mebibytes] = list(rows)
    assert calls[0] == [1, 2, 2, 2]  # the negative prompt, then both prompts an epoch
    assert calls[1] == [1, 1, 1]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-7)


class Encoder(nn.Module):
    """Remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def to(self, *args: Any, **_: Any) -> "Encoder":
        self.sent.append(str(args[0]))
        return self


class Counted(Gaussian):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.encoded = Encoder(), list[str]()

    def text_encoders(self) -> list[nn.Module]:
        return [self.encoder]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        assert self.encoder.sent[-1] == "meta"
        self.encoded += prompts
        return super().encode(prompts)


def test_encoders_visit_the_device_for_new_prompts_only() -> None:
    model = Counted()
    cache = TextCache(model, device=torch.device("meta"), most_bytes=1000)
    assert model.encoder.sent == ["cpu"]
    cache.encode(["a", "b", "a"])
    assert model.encoder.sent == ["cpu", "meta", "cpu"]
    cache.encode(["b", "a"])
    assert model.encoder.sent == ["cpu", "meta", "cpu"]
    assert model.encoded == ["a", "b"]


class Anywhere(Counted):
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.encoded += prompts
        return Gaussian.encode(self, prompts)


def test_the_cache_returns_what_was_encoded_and_forgets_the_oldest() -> None:
    model = Anywhere()
    row = 4 * 4  # four numbers a prompt
    cache = TextCache(model, device=CPU, most_bytes=2 * row)
    for prompts in (["a", "b", "a", "c"], ["a", "c"], ["c", "a", "b"]):
        found = cache.encode(prompts).tensors["text"]
        assert torch.equal(found, Gaussian().encode(prompts).tensors["text"])
    # Two are kept: of the first call all but "a", of the second all but "b".
    assert model.encoded == ["a", "b", "c", "a", "b"]
    cache.encode(["a", "b"])
    assert len(model.encoded) == 5


def test_latents_are_decoded_a_few_at_a_time(folders: Path) -> None:
    images, calls = {}, {}
    for rows in (None, 3):
        model, run = run_of(SD3, folders, compute={"rows_per_decode": rows})
        seen = calls_of(model.pipeline.vae.decoder)
        images[rows] = run.policy.decode(starts(model, *SD3.size(), count=8))
        calls[rows] = seen
    assert calls == {None: [8], 3: [3, 3, 2]}
    torch.testing.assert_close(images[3], images[None], rtol=0, atol=1e-6)


def test_tiles_bound_what_the_decoder_holds(folders: Path) -> None:
    images, areas = {}, {}
    for tiled in (False, True):
        model, run = run_of(SD3, folders, compute={"tiled_decode": tiled})
        seen: list[int] = []
        model.pipeline.vae.decoder.register_forward_pre_hook(
            lambda _module, args, seen=seen: seen.append(args[0][0, 0].numel())
        )
        images[tiled] = run.policy.decode(starts(model, 96, 96, count=1))
        areas[tiled] = max(seen)
    assert areas[False] == 48 * 48
    assert areas[True] <= 16 * 16
    assert images[True].shape == images[False].shape
    assert float((images[True] - images[False]).abs().mean()) < 0.05


@pytest.mark.parametrize(
    ("phase", "setting"),
    [
        ("self-test", "rowsPerTrainingCall"),
        ("rollout", "rowsPerCall"),
        ("scoring", "rowsPerDecode"),
        ("update", "rowsPerTrainingCall"),
        ("evaluation", "rowsPerCall"),
        (None, "strategy"),
    ],
)
def test_a_full_device_is_told_with_the_phase_and_the_setting(
    phase: str | None, setting: str
) -> None:
    def fill() -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    work = Stopwatch()(phase) if phase else nullcontext()
    with pytest.raises(torch.OutOfMemoryError) as caught, work:
        fill()
    code, message = main._judge(caught.value)
    assert code == ExitCode.DEVICE
    assert message.startswith(f"out of device memory in {phase or 'the start'}: ")
    assert f"spec.compute.{setting}" in message
    assert "tried to allocate 2 GiB" in message


def test_a_gpu_multiplies_matrices_in_tf32(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, nothing is changed."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    spec = SD3.spec(folders)
    before = torch.get_float32_matmul_precision()
    try:
        assert main.device_of(spec, 1) == CPU
        assert torch.get_float32_matmul_precision() == before == "highest"
        second = main.device_of(changed(spec, compute={"device": "cuda"}), 1)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert chosen == [second] == [torch.device("cuda", 1)]
