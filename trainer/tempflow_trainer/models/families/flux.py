"""FLUX.1, on diffusers' own pipeline: the guidance scale is an input of the network."""

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline
from torch import Tensor

from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.models import packed
from tempflow_trainer.models.base import Conditioning
from tempflow_trainer.models.pipeline_model import PipelineModel


class Flux(PipelineModel):
    """Latent diffusion with two text encoders; FLUX.1-dev has learned to guide itself."""

    pipeline_class = FluxPipeline
    classifier_free = False
    # Attention and feed-forward of the image stream and of the text stream, as the reference code
    # adapts them. The names of the first three fit the blocks that join the streams, too.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        channels: int = self.pipeline.vae.config.latent_channels
        return channels, *packed.latent_size(height, width, self.pipeline.vae_scale_factor)

    def schedule(self, steps: int, height: int, width: int) -> Schedule:
        _, rows, columns = self.latent_shape(height, width)
        tokens = rows * columns // packed.PATCH**2
        return packed.shifted_schedule(self.pipeline.scheduler, steps, tokens)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        # The padding is not masked: the model was trained to see it.
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), max_sequence_length=self._max_text_tokens
        )
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def embed_guidance(self, conditioning: Conditioning, scale: float) -> Conditioning:
        """FLUX.1-dev reads the scale; FLUX.1-schnell has no input for it."""
        if not self.transformer.config.guidance_embeds:
            return conditioning
        pooled_BP = conditioning.tensors["pooled_projections"]
        guidance_B = torch.full((len(pooled_BP),), scale, device=pooled_BP.device)
        return Conditioning({**conditioning.tensors, "guidance": guidance_B})

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.transformer.config
        return {
            "encoder_hidden_states": (self._max_text_tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.transformer.x_embedder.weight.dtype
        height, width = latents_BCHW.shape[-2:]
        text = conditioning.cast(dtype).tensors
        tokens_BLD = self.transformer(
            hidden_states=packed.pack(latents_BCHW.to(dtype)),
            timestep=packed.timestep(sigma_B, dtype),
            txt_ids=sigma_B.new_zeros(text["encoder_hidden_states"].shape[1], 3),
            img_ids=_positions(height, width).to(sigma_B),
            **text,
            return_dict=False,
        )[0]
        return packed.unpack(tokens_BLD, height, width)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents_BCHW.to(vae.device, vae.dtype) / vae.config.scaling_factor
        images: Tensor = vae.decode(latents + vae.config.shift_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


def _positions(height: int, width: int) -> Tensor:
    """(0, row, column) of every image token, [L, 3]; text stands at (0, 0, 0)."""
    rows = torch.arange(height // packed.PATCH)
    columns = torch.arange(width // packed.PATCH)
    return torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, columns)
