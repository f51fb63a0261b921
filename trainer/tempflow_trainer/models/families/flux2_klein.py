"""FLUX.2 klein, on diffusers' own pipeline: one text encoder, latents already in patches."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from tempflow_trainer.algorithm import schedule
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.models import packed
from tempflow_trainer.models.base import Conditioning
from tempflow_trainer.models.pipeline_model import PipelineModel


class Flux2Klein(PipelineModel):
    """Latent diffusion with a language model as text encoder.

    The base model is guided by a second velocity; the distilled one knows no guidance.
    """

    pipeline_class = Flux2KleinPipeline
    # The attention of both streams, and what the joint blocks read of it: they have one projection
    # for query, key, value and feed-forward.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_qkv_mlp_proj",
    )

    def __init__(self, pipeline: Flux2KleinPipeline, *, max_text_tokens: int) -> None:
        """Guided as the pipeline says."""
        super().__init__(pipeline, max_text_tokens=max_text_tokens)
        self.classifier_free = not pipeline.config.is_distilled

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of patches: the autoencoder's latent has a quarter of the channels at twice the size."""
        factor = self.pipeline.vae_scale_factor * packed.PATCH
        return self.transformer.config.in_channels, height // factor, width // factor

    def schedule(self, steps: int, height: int, width: int) -> Schedule:
        _, rows, columns = self.latent_shape(height, width)
        return schedule.from_scheduler(
            self.pipeline.scheduler,
            steps,
            mu=compute_empirical_mu(rows * columns, steps),
            sigmas=np.linspace(1, 1 / steps, steps).tolist(),
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        # The padding is not masked: the model was trained to see it.
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), max_sequence_length=self._max_text_tokens
        )
        return Conditioning({"encoder_hidden_states": embeds})

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.transformer.config.joint_attention_dim
        return {"encoder_hidden_states": (self._max_text_tokens, width)}

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.transformer.x_embedder.weight.dtype
        height, width = latents_BCHW.shape[-2:]
        text = conditioning.cast(dtype).tensors["encoder_hidden_states"]
        one, device = torch.zeros(1, dtype=torch.long), sigma_B.device
        rows, columns, words = (torch.arange(n) for n in (height, width, text.shape[1]))
        tokens_BLC = self.transformer(
            hidden_states=latents_BCHW.to(dtype).flatten(2).transpose(1, 2),
            timestep=packed.timestep(sigma_B, dtype),
            encoder_hidden_states=text,
            txt_ids=torch.cartesian_prod(one, one, one, words).to(device),
            img_ids=torch.cartesian_prod(one, rows, columns, one).to(device),
            return_dict=False,
        )[0]
        velocity_BCHW: Tensor = tokens_BLC.transpose(1, 2).unflatten(2, (height, width))
        return velocity_BCHW

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents_BCHW.to(vae.device, vae.dtype)
        mean_C11 = vae.bn.running_mean.to(latents)[:, None, None]
        std_C11 = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().to(latents)[:, None, None]
        patches = torch.nn.functional.pixel_shuffle(latents * std_C11 + mean_C11, packed.PATCH)
        images: Tensor = vae.decode(patches, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)
