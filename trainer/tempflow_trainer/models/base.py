"""What a family of models has to offer, and the guided velocity built on it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tempflow_trainer.algorithm.schedule import Schedule


@dataclass(frozen=True)
class Conditioning:
    """What the network reads of the prompts: named tensors, one row a prompt."""

    tensors: dict[str, Tensor]

    def rows(self, index_B: Tensor) -> "Conditioning":
        """The rows at ``index_B``, repeated as it repeats them."""
        return Conditioning(
            {name: tensor[index_B.to(tensor.device)] for name, tensor in self.tensors.items()}
        )

    def cast(self, dtype: torch.dtype) -> "Conditioning":
        """With floating-point tensors of that type; masks stay what they are."""
        return Conditioning(
            {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in self.tensors.items()
            }
        )

    def join(self, other: "Conditioning") -> "Conditioning":
        """The rows of both, one after the other."""
        return Conditioning(
            {
                name: torch.cat([tensor, other.tensors[name]])
                for name, tensor in self.tensors.items()
            }
        )


class FlowModel(ABC):
    """A text-to-image model that predicts v = noise - image. One subclass a family."""

    pipeline: Any = None
    """diffusers' own pipeline of the model; None where the family has none."""
    transformer: Any
    """The network that is trained; a diffusers model, which is untyped."""
    lora_targets: tuple[str, ...]
    """The projections that a LoRA without targets of its own adapts."""
    classifier_free: bool
    """Whether guidance needs a second, unconditional velocity."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of an image of that size in pixels."""

    @abstractmethod
    def schedule(self, steps: int, height: int, width: int) -> Schedule:
        """Noise levels, by the model's own scheduler and its configuration."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt."""

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the floating-point tensors that ``encode`` gives for one prompt, as long as it may be.

        Known without weights: by them the cost of a job is told. Masks cost nothing.
        """

    @abstractmethod
    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's v at noise levels ``sigma_B`` in [0, 1], same shape as the latents."""

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images [B, 3, height, width], float32 in [0, 1]."""

    def text_encoders(self) -> list[nn.Module]:
        """What ``encode`` runs; it may be moved away between two calls."""
        parts = {} if self.pipeline is None else self.pipeline.components
        return [
            part
            for name, part in parts.items()
            if name.startswith("text_encoder") and part is not None
        ]

    def move_rest(self, device: torch.device, *, text_encoders: bool) -> None:
        """Bring all but the transformer to ``device``, or that without the text encoders."""
        stay = [self.transformer, *([] if text_encoders else self.text_encoders())]
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and all(part is not other for other in stay):
                part.to(device)

    def decode_in_tiles(self) -> None:
        """Decode large latents piece by piece from now on: less memory, blended seams."""
        self.pipeline.vae.enable_tiling()

    def embed_guidance(self, conditioning: Conditioning, scale: float) -> Conditioning:
        """For a network that reads the guidance scale: with the scale among its inputs."""
        del scale
        return conditioning

    def combine(self, conditional_BCHW: Tensor, unconditional_BCHW: Tensor, scale: float) -> Tensor:
        """The velocity of classifier-free guidance."""
        return unconditional_BCHW + scale * (conditional_BCHW - unconditional_BCHW)


class TextEncoder(Protocol):
    """Encodes prompts, one row each: a model, or a cache before it."""

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...


@dataclass
class Policy:
    """A model with its guidance; counts the network's work in rows."""

    model: FlowModel
    guidance_scale: float
    negative: Conditioning | None
    """The one row that guidance steers away from; None where guidance needs none."""
    device: torch.device
    text: TextEncoder
    rows_per_decode: int | None = None
    """Most latents that are decoded at once; None decodes as many as are asked for."""
    training_guidance_scale: float | None = None
    """Of the velocities that are trained on, and of the reference's; None as in the rollout."""
    unconditional_gradient: bool = True
    """Whether training goes through the unconditional velocity of guidance, too."""
    evaluations: dict[str, int] = field(
        default_factory=lambda: {"rollout": 0, "training": 0, "reference": 0, "evaluation": 0}
    )

    @classmethod
    def of(
        cls,
        model: FlowModel,
        *,
        guidance_scale: float,
        negative_prompt: str,
        device: torch.device,
        text: TextEncoder | None = None,
        rows_per_decode: int | None = None,
        training_guidance_scale: float | None = None,
        unconditional_gradient: bool = True,
    ) -> "Policy":
        """Encode the negative prompt where classifier-free guidance will read it.

        Training is guided as the rollout where it has no scale of its own.
        """
        text = model if text is None else text
        scales = {guidance_scale, training_guidance_scale or guidance_scale}
        guided = model.classifier_free and scales != {1}
        return cls(
            model,
            guidance_scale,
            text.encode([negative_prompt]) if guided else None,
            device,
            text,
            rows_per_decode,
            training_guidance_scale,
            unconditional_gradient,
        )

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images on the CPU, [B, 3, height, width], float32 in [0, 1]."""
        parts = latents_BCHW.split(self.rows_per_decode or len(latents_BCHW))
        return torch.cat([self.model.decode(part).cpu() for part in parts])

    def scale(self, purpose: str) -> float:
        """The guidance of a velocity for that purpose."""
        if purpose in ("training", "reference") and self.training_guidance_scale is not None:
            return self.training_guidance_scale
        return self.guidance_scale

    def rows_per_velocity(self, purpose: str) -> int:
        """Rows of the network for one velocity: 2 with classifier-free guidance."""
        return 1 if self.negative is None or self.scale(purpose) == 1 else 2

    def velocity(
        self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning, *, purpose: str
    ) -> Tensor:
        """The guided velocity, or the network's own where it guides itself or not at all; float32.

        ``purpose`` names the counter of network rows to add to.
        """
        rows = len(latents_BCHW)
        scale, network_rows = self.scale(purpose), self.rows_per_velocity(purpose)
        self.evaluations[purpose] += rows * network_rows
        latents, sigma = latents_BCHW.to(self.device), sigma_B.to(self.device)
        if self.negative is None or network_rows == 1:
            embedded = self.model.embed_guidance(conditioning, scale)
            return self.model.velocity(latents, sigma, embedded).float()
        unconditional = self.negative.rows(torch.zeros(rows, dtype=torch.long))
        if not self.unconditional_gradient and purpose == "training":
            # First, for nothing may run between a forward and its backward where weights are
            # gathered for both.
            with torch.no_grad():
                plain = self.model.velocity(latents, sigma, unconditional).float()
            conditional = self.model.velocity(latents, sigma, conditioning).float()
            return self.model.combine(conditional, plain, scale)
        both = self.model.velocity(
            torch.cat([latents, latents]),
            torch.cat([sigma, sigma]),
            conditioning.join(unconditional),
        ).float()
        conditional, plain = both.chunk(2)
        return self.model.combine(conditional, plain, scale)
