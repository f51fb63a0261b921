"""The stochastic steps, each an affine map of state and velocity plus noise.

The rectified flow dx = v dt has the same marginals as the SDE

    dx = [v + g^2 / (2 sigma) (x + (1 - sigma) v)] dt + g dw

for every g, because the score of the Gaussian path is -(x + (1 - sigma) v) / sigma.

``flow``   g = a sqrt(sigma / (1 - sigma))     (Flow-GRPO, 2505.05470)
``dance``  g = a                               (DanceGRPO, 2505.07818)
``cps``    no SDE: the step mixes predicted image, predicted noise and fresh noise in the
           proportions that the schedule asks for (Flow-CPS, 2509.05952)

Factors are float64 and states float32: in half precision the mean overflows near the ends of the
schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow_trainer.algorithm.schedule import Schedule

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Transitions:
    """S stochastic steps: the draw is x_factor x + v_factor v + noise_std noise; [S] float64."""

    sigma_S: Tensor
    """Where the step starts."""
    dt_S: Tensor
    """How far it goes, negative."""
    x_factor_S: Tensor
    v_factor_S: Tensor
    noise_std_S: Tensor
    """eta, the deviation of the noise that the step adds."""


def transitions(
    kind: str,
    schedule: Schedule,
    noise_level: float,
    steps: Sequence[int] | None = None,
    landings: Sequence[int] | None = None,
) -> Transitions:
    """The stochastic ``steps`` of ``spec.sampling.sde``, all of the schedule's by default.

    Step k leads to the noise level of index ``landings``, by default k + 1: a step that jumps
    further is that of the coarser schedule which leaves the levels between out.
    """
    steps = list(range(schedule.steps)) if steps is None else list(steps)
    landings = [step + 1 for step in steps] if landings is None else list(landings)
    from_S, to_S = schedule.sigmas[steps], schedule.sigmas[landings]
    if kind == "cps":
        return _coefficients_preserving(from_S, to_S, noise_level)
    if kind == "dance":
        return _marginals_preserving(from_S, to_S, torch.full_like(from_S, noise_level))
    # At the first step 1 - sigma is zero; the level where the step lands stands in for it, as in
    # Flow-GRPO. It is chosen by index: a rounding error would defeat comparing sigma with 1.
    first_S = torch.tensor([step == 0 for step in steps])
    capped_S = torch.where(first_S, to_S, from_S)
    return _marginals_preserving(from_S, to_S, noise_level * torch.sqrt(from_S / (1 - capped_S)))


def _marginals_preserving(from_S: Tensor, to_S: Tensor, diffusion_S: Tensor) -> Transitions:
    """mu = x (1 + g^2 dt / (2 sigma)) + v dt (1 + g^2 (1 - sigma) / (2 sigma)), eta = g sqrt(-dt)
    (Flow-GRPO, eq. 9)."""
    dt_S = to_S - from_S
    half_g2_over_sigma_S = diffusion_S**2 / (2 * from_S)
    return Transitions(
        sigma_S=from_S,
        dt_S=dt_S,
        x_factor_S=1 + half_g2_over_sigma_S * dt_S,
        v_factor_S=dt_S * (1 + half_g2_over_sigma_S * (1 - from_S)),
        noise_std_S=diffusion_S * torch.sqrt(-dt_S),
    )


def _coefficients_preserving(from_S: Tensor, to_S: Tensor, noise_level: float) -> Transitions:
    """mu = (1 - s') image + s' cos(a pi / 2) noise, eta = s' sin(a pi / 2), with s' the level where
    the step lands, image = x - sigma v and noise = x + (1 - sigma) v as the network predicts them:
    the squares of both shares of noise add up to s'^2."""
    kept_S = to_S * math.cos(noise_level * math.pi / 2)
    return Transitions(
        sigma_S=from_S,
        dt_S=to_S - from_S,
        x_factor_S=(1 - to_S) + kept_S,
        v_factor_S=kept_S * (1 - from_S) - (1 - to_S) * from_S,
        noise_std_S=to_S * math.sin(noise_level * math.pi / 2),
    )


def noise_std_T(schedule: Schedule, noise_level: float, kind: str = "flow") -> Tensor:
    """eta_k of every step of the schedule, [T] float64."""
    return transitions(kind, schedule, noise_level).noise_std_S


def ode_step(x_BCHW: Tensor, velocity_BCHW: Tensor, dt: float) -> Tensor:
    """x + dt v in float32: the deterministic step."""
    return x_BCHW.float() + dt * velocity_BCHW.float()


def step_mean(
    x_BCHW: Tensor, velocity_BCHW: Tensor, *, x_factor_B: Tensor, v_factor_B: Tensor
) -> Tensor:
    """Mean of the stochastic step, float32."""
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
    deviation = -distance_log_prob(draw_BCHW, mean_BCHW, std_B)
    return -deviation / (2 * std**2) - torch.log(std) - LOG_SQRT_2PI


def distance_log_prob(draw_BCHW: Tensor, mean_BCHW: Tensor, std_B: Tensor) -> Tensor:
    """The same without constants and without the division by 2 eta^2, as Flow-CPS defines it:
    minus the mean square distance from the mean."""
    del std_B
    return -(draw_BCHW.detach().float() - mean_BCHW.float()).square().mean(dim=(-3, -2, -1))


def _per_row(factor_B: Tensor, like_BCHW: Tensor) -> Tensor:
    return factor_B.to(like_BCHW.device, torch.float32).view(-1, *[1] * (like_BCHW.ndim - 1))
