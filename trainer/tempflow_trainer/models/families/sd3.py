"""Stable Diffusion 3 and 3.5, on diffusers' own pipeline."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from tempflow_trainer.algorithm import schedule
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.models.base import Conditioning
from tempflow_trainer.models.pipeline_model import PipelineModel

# Of the two CLIP encoders, whose states stand before those of T5.
CLIP_TOKENS = 77


class Sd3(PipelineModel):
    """Latent diffusion with three text encoders and classifier-free guidance."""

    pipeline_class = StableDiffusion3Pipeline
    classifier_free = True
    # Attention of the image stream and of the text stream, as the paper adapts them.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor

    def schedule(self, steps: int, height: int, width: int) -> Schedule:
        del height, width  # the shift of SD3 does not depend on the resolution
        return schedule.from_scheduler(self.pipeline.scheduler, steps)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_text_tokens,
        )
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = CLIP_TOKENS + self._max_text_tokens
        return {
            "encoder_hidden_states": (tokens, self.transformer.config.joint_attention_dim),
            "pooled_projections": (self.transformer.config.pooled_projection_dim,),
        }

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.transformer.pos_embed.proj.weight.dtype
        velocity: Tensor = self.transformer(
            hidden_states=latents_BCHW.to(dtype),
            timestep=sigma_B * self.pipeline.scheduler.config.num_train_timesteps,
            **conditioning.cast(dtype).tensors,
            return_dict=False,
        )[0]
        return velocity

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents_BCHW.to(vae.device, vae.dtype) / vae.config.scaling_factor
        images: Tensor = vae.decode(latents + vae.config.shift_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)
