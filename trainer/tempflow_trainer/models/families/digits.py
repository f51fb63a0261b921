"""The tiny real model that ships with the package: handwritten digits, 14x14, in pixel space.

The shapes: N images, L tokens (the tokenizer's fixed length), D the text encoder's width, P the
width of its pooled output (equal to D here), H = W = 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase

from tempflow_api.errors import ManifestInvalid, ModelUnavailable, Problem
from tempflow_trainer.algorithm import schedule
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.models.base import Conditioning, FlowModel


@dataclass(frozen=True)
class DigitsPipeline:
    """The parts of the model: a transformer, its text side and its noise schedule.

    There is no autoencoder: a latent is the picture itself, one channel, -1 for paper, 1 for ink.
    """

    transformer: SD3Transformer2DModel
    text_encoder: CLIPTextModel
    tokenizer: PreTrainedTokenizerBase
    scheduler: FlowMatchEulerDiscreteScheduler

    @classmethod
    def load(cls, folder: Path) -> DigitsPipeline:
        """Read the parts from `folder`, in evaluation mode, without the network."""
        transformer = SD3Transformer2DModel.from_pretrained(
            folder / "transformer", local_files_only=True
        )
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        return cls(
            transformer=transformer.eval(),
            text_encoder=text_encoder.eval().requires_grad_(False),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(
                folder / "scheduler", local_files_only=True
            ),
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states [N, L, D] and pooled output [N, P]: the transformer's
        ``encoder_hidden_states`` and ``pooled_projections``. "" is the empty prompt of
        classifier-free guidance.
        """
        tokens = tokenize(self.tokenizer, prompts).to(self.text_encoder.device)
        output = self.text_encoder(input_ids=tokens)
        return output.last_hidden_state, output.pooler_output

    def decode(self, latents_N1HW: Tensor) -> Tensor:
        """Images [N, 3, H, W], float32 in [0, 1], three equal channels, 1 for ink."""
        grey_N1HW = ((latents_N1HW.float() + 1) / 2).clamp(0, 1)
        return grey_N1HW.expand(-1, 3, -1, -1).contiguous()


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """Token numbers [N, L]; a word is a token, and every prompt is padded to the fixed length L.

    As in Stable Diffusion 3 the padding is not masked: the model was trained to see it.
    """
    special = set(tokenizer.all_special_tokens)
    vocabulary = sorted(word for word in tokenizer.get_vocab() if word not in special)
    length = tokenizer.model_max_length
    for prompt in prompts:
        words = prompt.lower().split()
        for word in words:
            if word not in vocabulary:
                raise ValueError(
                    f"unknown word {word!r} in prompt {prompt!r}; understood: "
                    + " ".join(vocabulary)
                )
        # Two places are the start and the end token's.
        if len(words) > length - 2:
            raise ValueError(f"{len(words)} words in prompt {prompt!r}, expected <= {length - 2}")
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
    input_ids_NL: Tensor = encoded["input_ids"]
    return input_ids_NL


class Digits(FlowModel):
    """The family ``digits``."""

    classifier_free = True
    # Attention of the image stream and of the text stream, as in the larger models.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
    )

    def __init__(self, pipeline: DigitsPipeline, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self.transformer = pipeline.transformer

    @classmethod
    def load(
        cls,
        source: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
        max_text_tokens: int,
    ) -> Digits:
        """From a folder like the shipped one; it has one revision, and prompts of a few words.

        Raises:
            ModelUnavailable: a file that is missing or of another model.
        """
        del revision, max_text_tokens
        try:
            pipeline = DigitsPipeline.load(Path(source))
        except (OSError, ValueError) as error:
            raise ModelUnavailable(f"spec.model.source: {source}: {error}") from error
        pipeline.transformer.to(device)
        if dtype != pipeline.transformer.dtype:
            pipeline.transformer.to(dtype)
        return cls(pipeline, device)

    def move_rest(self, device: torch.device, *, text_encoders: bool) -> None:
        del text_encoders  # prompts are encoded on the CPU; it takes no time
        self._device = device

    def text_encoders(self) -> list[nn.Module]:
        return [self._pipeline.text_encoder]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, height, width

    def schedule(self, steps: int, height: int, width: int) -> Schedule:
        del height, width
        return schedule.from_scheduler(self._pipeline.scheduler, steps)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        try:
            hidden, pooled = self._pipeline.encode(prompts)
        except ValueError as error:
            problem = Problem("spec.data.prompts", str(error))
            raise ManifestInvalid("the job", [problem]) from error
        dtype = self.transformer.dtype
        return Conditioning(
            {
                "encoder_hidden_states": hidden.to(self._device, dtype),
                "pooled_projections": pooled.to(self._device, dtype),
            }
        )

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self._pipeline.text_encoder.config.max_position_embeddings
        return {
            "encoder_hidden_states": (tokens, self.transformer.config.joint_attention_dim),
            "pooled_projections": (self.transformer.config.pooled_projection_dim,),
        }

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        velocity: Tensor = self.transformer(
            hidden_states=latents_BCHW.to(self.transformer.dtype),
            timestep=sigma_B * self._pipeline.scheduler.config.num_train_timesteps,
            **conditioning.tensors,
            return_dict=False,
        )[0]
        return velocity

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._pipeline.decode(latents_BCHW)
