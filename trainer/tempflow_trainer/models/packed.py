"""Latents as FLUX.1 and Qwen-Image read them: one token a patch, and steps by their number.

L = H W / 4 tokens of D = 4 C numbers. Only the network sees tokens: trajectories stay
[B, C, H, W], which is the same because all that they do acts on each number alone.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from tempflow_trainer.algorithm import schedule
from tempflow_trainer.algorithm.schedule import Schedule

PATCH = 2


def pack(latents_BCHW: Tensor) -> Tensor:
    """Tokens [B, L, D], as ``_pack_latents`` of both pipelines orders them."""
    return F.pixel_unshuffle(latents_BCHW, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``; ``height`` and ``width`` are those of the latents."""
    patches_BDHW = tokens_BLD.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return F.pixel_shuffle(patches_BDHW, PATCH)


def latent_size(height: int, width: int, vae_factor: int) -> tuple[int, int]:
    """H and W of the latents of an image in pixels: whole patches, as the pipelines round."""
    factor = vae_factor * PATCH
    return PATCH * (height // factor), PATCH * (width // factor)


def timestep(sigma_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Noise levels for a network of that type: rounded on the scale of 1000, as both pipelines do.

    Rounding them as they are would ask a network in bfloat16 at other levels.
    """
    return (sigma_B * 1000).to(dtype) / 1000


def shifted_schedule(scheduler: Any, steps: int, tokens: int) -> Schedule:
    """Evenly spaced levels from 1 to 1/T, shifted by the number of image tokens L.

    Grid, shift and their defaults are those of ``FluxPipeline`` and ``QwenImagePipeline``; the
    rest is in the configuration of the model's scheduler.
    """
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return schedule.from_scheduler(
        scheduler, steps, mu=mu, sigmas=np.linspace(1, 1 / steps, steps).tolist()
    )
