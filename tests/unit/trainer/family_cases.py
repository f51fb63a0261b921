"""The families as tests see them: a tiny model of each, its adapter, its own pipeline."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempflow_api import naming
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.models import families
from tempflow_trainer.models.base import FlowModel, Policy
from tempflow_trainer.rollout import Walker
from tests import tiny_models

CPU = torch.device("cpu")
ALONE = Ranks(rank=0, local_rank=0, world=1)
MAX_TEXT_TOKENS = 40
PROMPTS = ("a three", "an eight")
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A family with the guidance that its pipeline is asked for."""

    family: str
    guidance: float
    negative: str = ""
    pipeline: Callable[[], Any] | None = None
    """Makes its tiny pipeline; the digits model has none."""
    variant: str = ""
    """Of the family's published models, which one's architecture it has."""

    def __str__(self) -> str:
        return self.variant or self.family

    def source(self, folders: Path) -> str:
        """Where the model is, saved on first use."""
        if self.pipeline is None:
            return "builtin:digits"
        folder = folders / str(self)
        if not folder.exists():
            self.pipeline().save_pretrained(folder)
        return str(folder)

    def size(self) -> tuple[int, int]:
        """An image size that it can draw."""
        return (14, 14) if self.pipeline is None else (16, 32)

    def load(self, folders: Path, precision: str = "float32") -> FlowModel:
        """Its adapter, loaded as a job loads it."""
        spec = self.spec(folders, precision)
        return families.load(spec.model, cache=folders, device=CPU)

    def spec(self, folders: Path, precision: str = "float32", tuning: str = "lora") -> JobSpec:
        """A job of one small epoch; alpha is not the rank."""
        height, width = self.size()
        model = {
            "family": self.family,
            "source": self.source(folders),
            "precision": precision,
            "maxTextTokens": MAX_TEXT_TOKENS,
            "tuning": tuning,
        }
        if tuning == "lora":
            model["lora"] = {"rank": 4, "alpha": 12}
        return JobSpec.model_validate(
            {
                "model": model,
                "data": {"prompts": list(PROMPTS)},
                "sampling": {
                    "steps": STEPS,
                    "height": height,
                    "width": width,
                    "guidanceScale": self.guidance,
                    "negativePrompt": self.negative,
                },
                "algorithm": {
                    "promptsPerEpoch": 2,
                    "seedsPerPrompt": 1,
                    "branchesPerSeed": 2,
                    "updatesPerEpoch": 1,
                    "klCoefficient": 0.01,
                },
                "rewards": [{"name": "digit-ink", "weight": 1}],
                "compute": {"device": "cpu", "rowsPerCall": 8, "rowsPerTrainingCall": 4},
            }
        )

    def job(self, folders: Path, epochs: int, **compute: object) -> TempFlowGRPOJob:
        """A whole job: so many updates, and a small evaluation at both ends."""
        spec = self.spec(folders).model_dump()
        spec["algorithm"]["epochs"] = epochs
        spec["model"]["ema"]["every_updates"] = (
            1  # else a short run would export what it began with
        )
        spec["evaluation"] |= {
            "steps": 2,
            "prompts": 1,
            "images_per_prompt": 1,
            "every_epochs": epochs,
        }
        spec["compute"] |= compute
        return TempFlowGRPOJob.model_validate(
            {
                "apiVersion": naming.API_VERSION,
                "kind": naming.KIND,
                "metadata": {"name": "demo"},
                "spec": spec,
            }
        )

    def policy(self, model: FlowModel, guidance: float | None = None) -> Policy:
        scale = self.guidance if guidance is None else guidance
        return Policy.of(model, guidance_scale=scale, negative_prompt=self.negative, device=CPU)

    def our_images(self, model: FlowModel, starts_BCHW: Tensor, height: int, width: int) -> Tensor:
        """Deterministic images of the prompts, [B, 3, height, width]."""
        walker = Walker(self.policy(model), model.schedule(STEPS, height, width), 0.7, 8)
        return model.decode(walker.sample(starts_BCHW, model.encode(PROMPTS)))

    def its_arguments(self, height: int, width: int) -> dict[str, Any]:
        """What its pipeline is asked for, but the latents."""
        negative = [self.negative] * len(PROMPTS)
        by_family: dict[str, dict[str, Any]] = {
            "sd3": {"guidance_scale": self.guidance, "negative_prompt": negative},
            "flux": {"guidance_scale": self.guidance},
            "qwen-image": {"true_cfg_scale": self.guidance, "negative_prompt": negative},
            # Its negative prompt is always the empty one.
            "flux2-klein": {"guidance_scale": self.guidance},
        }
        return {
            "prompt": list(PROMPTS),
            "height": height,
            "width": width,
            "num_inference_steps": STEPS,
            "max_sequence_length": MAX_TEXT_TOKENS,
            "output_type": "pt",
            **by_family[self.family],
        }

    def its_latents(self, pipeline: Any, starts_BCHW: Tensor) -> Tensor:
        """Start noises as its pipeline takes them."""
        if self.family in ("flux", "qwen-image"):
            packed: Tensor = pipeline._pack_latents(starts_BCHW, *starts_BCHW.shape)
            return packed
        return starts_BCHW

    def its_images(self, pipeline: Any, starts_BCHW: Tensor, height: int, width: int) -> Tensor:
        """The same by the family's own pipeline."""
        pipeline.set_progress_bar_config(disable=True)
        latents = self.its_latents(pipeline, starts_BCHW)
        images: Tensor = pipeline(latents=latents, **self.its_arguments(height, width)).images
        return images


DIGITS = Case("digits", guidance=2.0)
SD3 = Case("sd3", guidance=4.5, pipeline=tiny_models.sd3_pipeline)
FLUX = Case("flux", guidance=3.5, pipeline=tiny_models.flux_pipeline)
QWEN = Case("qwen-image", guidance=4.0, negative=" ", pipeline=tiny_models.qwen_pipeline)
KLEIN = Case("flux2-klein", guidance=4.0, pipeline=tiny_models.klein_pipeline)
# What the other published models of a family are built like.
VARIANTS = [
    Case("sd3", 4.5, pipeline=partial(tiny_models.sd3_pipeline, qk_norm=None), variant="sd3-first"),
    Case(
        "sd3",
        4.5,
        pipeline=partial(tiny_models.sd3_pipeline, dual_attention=(0,)),
        variant="sd3.5-medium",
    ),
    Case(
        "flux2-klein",
        1.0,
        pipeline=partial(tiny_models.klein_pipeline, distilled=True),
        variant="klein-distilled",
    ),
]


def plain_pipeline(case: Case, folders: Path) -> Any:
    """The family's own pipeline, without our code."""
    assert case.pipeline is not None
    return type(case.pipeline()).from_pretrained(case.source(folders))


def starts(model: FlowModel, height: int, width: int, count: int = len(PROMPTS)) -> Tensor:
    """Start noises [B, C, H, W]."""
    shape = model.latent_shape(height, width)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
