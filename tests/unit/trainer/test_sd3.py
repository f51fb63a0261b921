"""Stable Diffusion 3 against diffusers' own pipeline, with small random weights."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Lora, Model
from tempflow_trainer import seeds
from tempflow_trainer.models import families
from tempflow_trainer.models.base import Policy
from tempflow_trainer.models.families.sd3 import Sd3
from tempflow_trainer.models.tuning import LoraTuning
from tempflow_trainer.rollout import Walker
from tests.numerics.toys import CPU
from tests.tiny_models import save_sd3

PROMPTS = ["a photo of a cat", "two dogs and a very long story about them"]
STEPS, TEXT_TOKENS = 6, 32
# Rows are batched in another order, so the last digits of float32 differ.
TOLERANCE = 1e-4


def ours(model: Sd3, height: int, width: int, guidance: float, negative: str = "") -> Tensor:
    policy = Policy.of(model, guidance_scale=guidance, negative_prompt=negative, device=CPU)
    walker = Walker(policy, model.schedule(STEPS, height, width), 0.7, rows_per_call=3)
    latents = walker.sample(starts(model, height, width), model.encode(PROMPTS))
    return model.decode(latents)


def starts(model: Sd3, height: int, width: int) -> Tensor:
    return seeds.normal((len(PROMPTS), *model.latent_shape(height, width)), 0, "start")


def theirs(
    model: Sd3,
    height: int,
    width: int,
    guidance: float,
    negative: str = "",
    pipeline: StableDiffusion3Pipeline | None = None,
) -> Tensor:
    pipeline = pipeline or model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    found: Tensor = pipeline(
        prompt=PROMPTS,
        negative_prompt=[negative] * len(PROMPTS),
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=starts(model, height, width),
        max_sequence_length=TEXT_TOKENS,
        output_type="pt",
    ).images
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("models") / "sd3")


def load(source: Path) -> Sd3:
    spec = Model(family="sd3", source=str(source), tuning="full", max_text_tokens=TEXT_TOKENS)
    loaded = families.load(spec, cache=source, device=CPU)
    assert isinstance(loaded, Sd3)
    return loaded


@pytest.fixture(scope="module")
def model(source: Path) -> Sd3:
    return load(source)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 16)])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_our_image_is_the_pipelines(model: Sd3, height: int, width: int, guidance: float) -> None:
    found = ours(model, height, width, guidance)
    assert found.shape == (2, 3, height, width)
    assert float(found.std()) > 0.01
    expected = theirs(model, height, width, guidance)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_the_negative_prompt_is_the_pipelines(model: Sd3) -> None:
    found = ours(model, 32, 32, 4.5, negative="blurry")
    expected = theirs(model, 32, 32, 4.5, negative="blurry")
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(found, ours(model, 32, 32, 4.5), atol=10 * TOLERANCE)


def test_prompt_and_guidance_matter(model: Sd3) -> None:
    """Random weights must not hide what is compared above."""
    guided, plain = ours(model, 32, 32, 4.5), ours(model, 32, 32, 1.0)
    assert (guided - plain).abs().max() > 10 * TOLERANCE
    policy = Policy.of(model, guidance_scale=1, negative_prompt="", device=CPU)
    walker = Walker(policy, model.schedule(STEPS, 32, 32), 0.7, rows_per_call=8)
    start = starts(model, 32, 32)
    swapped = model.decode(walker.sample(start, model.encode(PROMPTS[::-1])))
    assert (swapped - plain).abs().max() > 10 * TOLERANCE


def test_a_prompt_is_encoded_alike_in_any_company(model: Sd3) -> None:
    together, alone = model.encode(PROMPTS), model.encode(PROMPTS[1:])
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(together.tensors[name][1:], tensor, rtol=1e-4, atol=1e-5)


def test_plain_diffusers_loads_the_exported_update_with_its_scale(
    tmp_path: Path, source: Path
) -> None:
    tuned = load(source)
    plain = ours(tuned, 32, 32, 4.5)
    tuning = LoraTuning(tuned, Lora(rank=4, alpha=12), run_seed=0)
    with torch.no_grad():
        for index, parameter in enumerate(tuning.parameters().values()):
            parameter.add_(0.2 * seeds.normal(tuple(parameter.shape), 0, index))
    expected = ours(tuned, 32, 32, 4.5)
    assert (expected - plain).abs().max() > 10 * TOLERANCE
    tuning.export(tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(source)
    pipeline.load_lora_weights(tmp_path / layout.ADAPTER)
    found = theirs(tuned, 32, 32, 4.5, pipeline=pipeline)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    for source, words in (
        (tmp_path / "model", "cannot be loaded as StableDiffusion3Pipeline"),
        (tmp_path / "none", "no folder"),
    ):
        spec = Model(family="sd3", source=str(source), tuning="full")
        with pytest.raises(ModelUnavailable, match=words):
            families.load(spec, cache=tmp_path, device=CPU)
