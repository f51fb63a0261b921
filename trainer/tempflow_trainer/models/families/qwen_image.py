"""Qwen-Image, on diffusers' own pipeline: classifier-free guidance that keeps the norm."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from torch import Tensor

from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.models import packed
from tempflow_trainer.models.base import Conditioning
from tempflow_trainer.models.pipeline_model import PipelineModel


class QwenImage(PipelineModel):
    """Latent diffusion with a vision-language model as text encoder."""

    pipeline_class = QwenImagePipeline
    classifier_free = True
    # Attention and feed-forward of the image stream and of the text stream, as the reference code
    # adapts them.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        channels: int = self.pipeline.vae.config.z_dim
        return channels, *packed.latent_size(height, width, self.pipeline.vae_scale_factor)

    def schedule(self, steps: int, height: int, width: int) -> Schedule:
        _, rows, columns = self.latent_shape(height, width)
        tokens = rows * columns // packed.PATCH**2
        return packed.shifted_schedule(self.pipeline.scheduler, steps, tokens)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Padded to the same length whatever the prompts, so that rows of two calls join."""
        embeds_BLD, mask_BL = self.pipeline.encode_prompt(
            prompt=list(prompts), max_sequence_length=self._max_text_tokens
        )
        if mask_BL is None:  # what the pipeline returns where no row is padded
            mask_BL = torch.ones(embeds_BLD.shape[:2], device=embeds_BLD.device)
        missing = self._max_text_tokens - embeds_BLD.shape[1]
        return Conditioning(
            {
                "encoder_hidden_states": F.pad(embeds_BLD, (0, 0, 0, missing)),
                "encoder_hidden_states_mask": F.pad(mask_BL.bool(), (0, missing)),
            }
        )

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.transformer.config.joint_attention_dim
        return {"encoder_hidden_states": (self._max_text_tokens, width)}

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.transformer.img_in.weight.dtype
        height, width = latents_BCHW.shape[-2:]
        one_frame = (1, height // packed.PATCH, width // packed.PATCH)
        tokens_BLD = self.transformer(
            hidden_states=packed.pack(latents_BCHW.to(dtype)),
            timestep=packed.timestep(sigma_B, dtype),
            img_shapes=[[one_frame]] * len(latents_BCHW),
            **conditioning.cast(dtype).tensors,
            return_dict=False,
        )[0]
        return packed.unpack(tokens_BLD, height, width)

    def combine(self, conditional_BCHW: Tensor, unconditional_BCHW: Tensor, scale: float) -> Tensor:
        """Plain guidance, then every token back to the norm of its conditional velocity."""
        plain_BLD = packed.pack(super().combine(conditional_BCHW, unconditional_BCHW, scale))
        norm_BL1 = packed.pack(conditional_BCHW).norm(dim=-1, keepdim=True)
        rescaled_BLD = plain_BLD * (norm_BL1 / plain_BLD.norm(dim=-1, keepdim=True))
        height, width = conditional_BCHW.shape[-2:]
        return packed.unpack(rescaled_BLD, height, width)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
        mean_C11, std_C11 = statistics.to(vae.device, vae.dtype)[:, :, None, None]
        latents = latents_BCHW.to(vae.device, vae.dtype) * std_C11 + mean_C11
        # The autoencoder is one of videos: an image is a video of one frame.
        images: Tensor = vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]
        return (images.float() / 2 + 0.5).clamp(0, 1)
