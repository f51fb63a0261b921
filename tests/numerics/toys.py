"""Flow models about which everything is known, and runs built on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import seeds
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.data import Prompt
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.loop import Run
from tempflow_trainer.main import build_run
from tempflow_trainer.models.base import Conditioning, FlowModel, Policy
from tempflow_trainer.rewards.base import Reward, Term
from tempflow_trainer.rollout import Walker
from tests.numerics import schedules

MEAN, VARIANCE = 0.8, 0.25
CPU = torch.device("cpu")
ALONE = Ranks(rank=0, world=1, local_rank=0)
TEXT_WIDTH = 4


class Toy(FlowModel):
    """What the toys share: the SD3 schedule, prompts as random vectors, images by a sigmoid."""

    classifier_free = False
    lora_targets = ()

    def __init__(self, shape: tuple[int, int, int], schedule_of: Callable[[int], Schedule]) -> None:
        self.shape, self._schedule_of = shape, schedule_of
        self.transformer: Any = nn.Identity()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        del height, width
        return self.shape

    def schedule(self, steps: int, height: int, width: int) -> Schedule:
        del height, width
        return self._schedule_of(steps)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        rows = [seeds.normal((TEXT_WIDTH,), 0, prompt) for prompt in prompts]
        return Conditioning({"text": torch.stack(rows)})

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text": (TEXT_WIDTH,)}

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW.float().sigmoid().expand(-1, 3, -1, -1)


class Gaussian(Toy):
    """The exact flow to data distributed as N(MEAN, VARIANCE) in every dimension."""

    def __init__(
        self,
        schedule_of: Callable[[int], Schedule] = schedules.sd3,
        shape: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__(shape, schedule_of)

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        t = sigma_B.view(-1, 1, 1, 1)
        return gaussian_velocity(latents_BCHW, t)


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | x] on the path between N(MEAN, VARIANCE) and N(0, 1)."""
    variance = path_variance(t)
    return -MEAN + (t - (1 - t) * VARIANCE) / variance * (x - (1 - t) * MEAN)


def path_variance(t: Tensor) -> Tensor:
    return (1 - t) ** 2 * VARIANCE + t**2


class Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width + TEXT_WIDTH + 1, 16)
        self.outer = nn.Linear(16, width)
        self.config = {"width": width}

    @classmethod
    def from_config(cls, config: dict[str, int]) -> "Perceptron":
        """As a model of diffusers is made again."""
        return cls(**config)

    def forward(self, x_BD: Tensor, sigma_B: Tensor, text: Tensor) -> Tensor:
        read = torch.cat([x_BD, text, sigma_B[:, None]], dim=1)
        out: Tensor = self.outer(torch.tanh(self.inner(read)))
        return out

    def save_pretrained(self, folder: Path) -> None:
        """As a model of diffusers exports itself."""
        folder.mkdir(parents=True)
        save_file(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")


class Mlp(Toy):
    """A random network of one hidden layer: nonlinear, trainable, and fast."""

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 2, 2),
        schedule_of: Callable[[int], Schedule] = schedules.sd3,
        *,
        guided: bool = False,
    ) -> None:
        super().__init__(shape, schedule_of)
        self.classifier_free = guided
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.transformer = Perceptron(torch.Size(shape).numel())

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.tensors["text"]
        out: Tensor = self.transformer(latents_BCHW.flatten(1), sigma_B, text)
        return out.view_as(latents_BCHW)


def walker_of(
    model: FlowModel, steps: int = 10, *, noise_level: float = 0.7, rows_per_call: int = 1000
) -> Walker:
    """A walker without guidance."""
    policy = Policy.of(model, guidance_scale=1, negative_prompt="", device=CPU)
    return Walker(policy, model.schedule(steps, 0, 0), noise_level, rows_per_call)


@dataclass(frozen=True)
class Brightness:
    """Mean of the image, weighted by fixed random numbers: differentiable, known, not constant."""

    batch_size: int = 64

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        del prompts, metadata
        weights = seeds.normal(images_N3HW.shape[1:], 0, "brightness")
        return (images_N3HW * weights).mean(dim=(1, 2, 3))


def spec_of(changes: Mapping[str, object] | None = None) -> JobSpec:
    """A small job; ``changes`` by path in the manifest, for instance ``algorithm.method``."""
    tree: dict[str, Any] = {
        "model": {"family": "digits", "source": "builtin:digits", "tuning": "full"},
        "data": {"prompts": ["a one", "a two", "a three", "a four"]},
        "sampling": {"steps": 5, "width": 14, "height": 14, "guidanceScale": 1},
        "algorithm": {
            "epochs": 2,
            "promptsPerEpoch": 4,
            "seedsPerPrompt": 2,
            "branchesPerSeed": 3,
            "updatesPerEpoch": 1,
            "clipRange": 3e-3,
            "klCoefficient": 0,
        },
        "rewards": [{"name": "digit-ink"}],
        "optimizer": {"learningRate": 1e-3},
        "evaluation": {"steps": 4, "prompts": 2, "imagesPerPrompt": 2},
        "compute": {"device": "cpu", "rowsPerCall": 256, "rowsPerTrainingCall": 64},
    }
    for path, value in (changes or {}).items():
        *sections, field = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return JobSpec.model_validate(tree)


FLOW_GRPO: dict[str, object] = {
    "algorithm.method": "flow-grpo",
    "algorithm.branchesPerSeed": 1,
    "algorithm.weighting": "none",
    "algorithm.advantage": {"scope": "prompt"},
}
"""Changes that make a job one of Flow-GRPO."""


def prompts_of(spec: JobSpec) -> list[Prompt]:
    return [Prompt(i, text, {}) for i, text in enumerate(spec.data.prompts or [])]


def run_of(spec: JobSpec, model: FlowModel | None = None) -> Run:
    """A run of ``spec`` on a toy, rewarded for brightness; without noise in the optimizer."""
    run = build_run(spec, model or Mlp(), prompts_of(spec), ALONE, CPU, lambda: False)
    return replace(run, reward=Reward([Term("brightness", 1.0, Brightness())]))


def still(run: Run) -> Run:
    """The run with an optimizer that leaves the weights alone: gradients can be read after it."""
    return replace(
        run,
        optimizer=torch.optim.SGD(list(run.tuning.parameters().values()), lr=0.0),
        max_grad_norm=1e9,
    )


def gradient(run: Run) -> Tensor:
    """What the last update found, flat."""
    parts = [p.grad for p in run.tuning.parameters().values() if p.grad is not None]
    return torch.cat([part.flatten() for part in parts])
