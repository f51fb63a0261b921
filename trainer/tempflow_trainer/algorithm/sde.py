"""The stochastic step that has the marginals of the deterministic one (Flow-GRPO, 2505.05470).

The rectified flow dx = v dt has the same marginals as the SDE

    dx = [v + g^2 / (2 sigma) (x + (1 - sigma) v)] dt + g dw,    g = a sqrt(sigma / (1 - sigma)),

because the score of the Gaussian path is -(x + (1 - sigma) v) / sigma. All in float32: in half
precision the mean overflows near the ends of the schedule.
"""

import math

import torch
from torch import Tensor

from tempflow_trainer.algorithm.schedule import Schedule

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def diffusion_T(schedule: Schedule, noise_level: float) -> Tensor:
    """g_k for every step, [T] float64.

    At the first step 1 - sigma is zero; sigma_1 stands in for sigma_0 in the denominator, as in
    Flow-GRPO. It is chosen by index and not by comparing sigma with 1, which a rounding error
    would defeat.
    """
    sigmas = schedule.sigmas
    capped_T = sigmas[:-1].clone()
    capped_T[0] = sigmas[1]
    return noise_level * torch.sqrt(sigmas[:-1] / (1 - capped_T))


def noise_std_T(schedule: Schedule, noise_level: float) -> Tensor:
    """eta_k = g_k sqrt(-dt_k), the deviation of the noise that step k adds, [T] float64."""
    return diffusion_T(schedule, noise_level) * torch.sqrt(-schedule.dt_T)


def ode_step(x_BCHW: Tensor, velocity_BCHW: Tensor, dt: float) -> Tensor:
    """x + dt v in float32: the deterministic step."""
    return x_BCHW.float() + dt * velocity_BCHW.float()


def step_mean(
    x_BCHW: Tensor, velocity_BCHW: Tensor, *, sigma_B: Tensor, dt_B: Tensor, diffusion_B: Tensor
) -> Tensor:
    """Mean of the stochastic step (Flow-GRPO, eq. 9), float32.

    mu = x (1 + g^2 dt / (2 sigma)) + v dt (1 + g^2 (1 - sigma) / (2 sigma))
    """
    half_g2_over_sigma_B = diffusion_B.double() ** 2 / (2 * sigma_B.double())
    x_factor_B = 1 + half_g2_over_sigma_B * dt_B.double()
    v_factor_B = dt_B.double() * (1 + half_g2_over_sigma_B * (1 - sigma_B.double()))
    return (
        _per_row(x_factor_B, x_BCHW) * x_BCHW.float()
        + _per_row(v_factor_B, x_BCHW) * velocity_BCHW.float()
    )


def log_prob(draw_BCHW: Tensor, mean_BCHW: Tensor, std_B: Tensor) -> Tensor:
    """Log-density of each draw, averaged over the dimensions of the latent, [B] float32.

    The average, not the sum, is what clip range and loss scale of the field refer to. The leading
    dimensions broadcast: [B, K, C, H, W] draws against [B, 1, C, H, W] means give [B, K].
    """
    std = std_B.float()
    deviation = (draw_BCHW.detach().float() - mean_BCHW.float()).square().mean(dim=(-3, -2, -1))
    return -deviation / (2 * std**2) - torch.log(std) - LOG_SQRT_2PI


def _per_row(factor_B: Tensor, like_BCHW: Tensor) -> Tensor:
    return factor_B.to(like_BCHW.device, torch.float32).view(-1, *[1] * (like_BCHW.ndim - 1))
