"""What `tempflow sample` starts: a stored result draws what the model that made it draws."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load, save
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.errors import ExitCode
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import sample
from tempflow_trainer.evaluation import write_grid
from tempflow_trainer.main import tuning_of
from tempflow_trainer.models import families
from tempflow_trainer.models.base import Conditioning, FlowModel
from tests.unit.api.rule_breakers import Breaker

PROMPTS = ["a three", "a seven"]
CPU = torch.device("cpu")
Shell = Callable[..., tuple[int, str]]


def spec_of(tuning: str, **compute: object) -> JobSpec:
    fields = {"evaluation": {"steps": 3}, "compute": {"device": "cpu", **compute}}
    if tuning == "full":
        fields |= {"model.tuning": "full", "model.lora": None}
    return JobSpec.model_validate(Breaker("", 0, fields).manifest()["spec"])


def model_of(spec: JobSpec) -> FlowModel:
    return families.load(spec.model, cache=Path("unused"), device=CPU)


def moved(spec: JobSpec, result: Path) -> FlowModel:
    """A model whose trained weights are far from the start, exported to ``result``.

    The stored job asks for GPUs, which nobody who draws needs to have.
    """
    model = model_of(spec)
    tuning = tuning_of(spec, model)
    torch.manual_seed(0)
    tuning.assign(
        {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in tuning.parameters().items()}
    )
    result.mkdir(parents=True)
    tuning.export(result)
    trained_on = spec.compute.model_copy(update={"device": "cuda"})
    stored = spec.model_copy(update={"compute": trained_on})
    (result / layout.CONFIG).write_text(stored.model_dump_json(by_alias=True))
    return model


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """Calls the sampler; exit code and what it said on stderr."""

    def call(source: Path, *arguments: str) -> tuple[int, str]:
        words = [f"--from={source}", *(f"--prompt={prompt}" for prompt in PROMPTS)]
        monkeypatch.setattr(sys, "argv", ["sample", *words, "--count=3", *arguments])
        code = sample.main()
        return code, capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    return call


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_result_draws_as_the_model_in_the_run_did(
    shell: Shell, tmp_path: Path, tuning: str
) -> None:
    spec = spec_of(tuning)
    trained = moved(spec, tmp_path / "result")
    for name, model in (("trained", trained), ("base", model_of(spec))):
        images = sample.draw(model, spec, PROMPTS, count=3, seed=0)
        write_grid(images, PROMPTS, tmp_path / f"{name}.png")
    assert shell(tmp_path / "result", "--device=cpu") == (0, "")
    assert shell(tmp_path / "result", "--device=cpu", "--base", "--out=before.png") == (0, "")
    after, before, *expected = (
        Image.open(tmp_path / name)
        for name in ("grid.png", "before.png", "trained.png", "base.png")
    )
    assert differs_by(after, expected[0]) <= 1  # of 255: rounding of exported and merged weights
    assert differs_by(before, expected[1]) == 0
    assert differs_by(after, before) > 50


def differs_by(first: Image.Image, second: Image.Image) -> int:
    extrema = ImageChops.difference(first.convert("L"), second.convert("L")).getextrema()
    return int(extrema[1])  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_the_device_of_the_run_is_asked_for(shell: Shell, tmp_path: Path) -> None:
    moved(spec_of("lora"), tmp_path / "result")
    code, said = shell(tmp_path / "result")
    assert code == ExitCode.DEVICE
    assert "cuda asked for" in said


def test_images_are_drawn_in_the_parts_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("lora", rowsPerCall=2, rowsPerDecode=1, textCacheMebibytes=1)
    model, decoded, encoded = model_of(spec), list[int](), list[list[str]]()
    decode, encode = model.decode, model.encode

    def counted_decode(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return decode(latents)

    def counted_encode(prompts: Sequence[str]) -> Conditioning:
        encoded.append(list(prompts))
        return encode(prompts)

    monkeypatch.setattr(model, "decode", counted_decode)
    monkeypatch.setattr(model, "encode", counted_encode)
    images = sample.draw(model, spec, PROMPTS, count=3, seed=0)
    assert images.shape == (2, 3, 3, 14, 14)
    assert decoded == [1] * 6
    assert [p for p in encoded if p[0] in PROMPTS] == [["a three"], ["a seven"]]
    at_once = sample.draw(model_of(spec), spec_of("lora"), PROMPTS, count=3, seed=0)
    assert int((images.int() - at_once.int()).abs().max()) <= 1


def test_the_models_of_the_run_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = tmp_path / "run" / layout.CHECKPOINTS / "step"
    assert sample.model_cache(step) == tmp_path / "run" / "models"
    assert sample.model_cache(tmp_path / "result") == tmp_path / "models"
    monkeypatch.setenv(naming.ENV_MODEL_CACHE, "/cache")
    assert sample.model_cache(step) == Path("/cache")


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("fault", ["cut", "gone", "of another model"])
def test_a_damaged_result_is_one_line(
    shell: Shell, tmp_path: Path, tuning: str, fault: str
) -> None:
    result = tmp_path / "result"
    moved(spec_of(tuning), result)
    (weights,) = result.rglob("*.safetensors")
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif fault == "gone":
        weights.unlink()
    else:
        wider = {n: t.repeat_interleave(2, 0) for n, t in load(weights.read_bytes()).items()}
        weights.write_bytes(save(wider))
    code, said = shell(result, "--device=cpu")
    assert code == ExitCode.MODEL, said
    assert said.startswith(f"error: {result}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ['{"model": 3}', "{"])
def test_a_job_that_is_none_is_one_line(shell: Shell, tmp_path: Path, text: str) -> None:
    (tmp_path / layout.CONFIG).write_text(text)
    code, said = shell(tmp_path, "--device=cpu")
    assert code == ExitCode.MODEL
    assert said.startswith(f"error: {tmp_path / layout.CONFIG} is not a job: ")
    assert said.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_one_line(shell: Shell, tmp_path: Path) -> None:
    moved(spec_of("lora"), tmp_path / "result")
    (tmp_path / "file").touch()
    code, said = shell(tmp_path / "result", "--device=cpu", "--out=file/grid.png")
    assert code == 1
    assert said.startswith("error: cannot write file/grid.png: ")
    assert said.count("\n") == 1
