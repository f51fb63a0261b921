"""Deterministic steps of second order, for the tail that follows the last stochastic step."""

import math
from dataclasses import dataclass

from torch import Tensor

from tempflow_trainer.algorithm import sde


@dataclass(frozen=True)
class Remembered:
    """The step before: its noise level, and the image that the network predicted there."""

    sigma: float
    image_BCHW: Tensor


def dpm2_step(
    x_BCHW: Tensor,
    velocity_BCHW: Tensor,
    *,
    sigma: float,
    sigma_next: float,
    before: Remembered | None,
) -> tuple[Tensor, Remembered]:
    """A step of DPM-Solver++(2M) (2211.01095, algorithm 2) for x = (1 - sigma) image + sigma noise.

    The image is predicted linearly in lambda = log((1 - sigma) / sigma) from this step and the one
    before. The first step, and the last one, where lambda has no end, are of first order: there
    the method is the deterministic step of the flow.
    """
    image_BCHW = x_BCHW.float() - sigma * velocity_BCHW.float()
    remembered = Remembered(sigma, image_BCHW)
    if before is None or sigma_next == 0:
        return sde.ode_step(x_BCHW, velocity_BCHW, sigma_next - sigma), remembered
    half_ratio = (_lambda(sigma_next) - _lambda(sigma)) / (
        2 * (_lambda(sigma) - _lambda(before.sigma))
    )
    ahead_BCHW = (1 + half_ratio) * image_BCHW - half_ratio * before.image_BCHW
    kept = sigma_next / sigma
    stepped_BCHW = kept * x_BCHW.float() + ((1 - sigma_next) - kept * (1 - sigma)) * ahead_BCHW
    return stepped_BCHW, remembered


def _lambda(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio."""
    return math.log((1 - sigma) / sigma)
