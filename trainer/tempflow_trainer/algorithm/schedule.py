"""The noise levels that a trajectory passes, as the model's own scheduler sets them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SetsSigmas(Protocol):
    """The part of diffusers' flow-matching schedulers that is used here."""

    sigmas: Tensor

    def set_timesteps(
        self,
        num_inference_steps: int,
        *,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Fill ``sigmas`` with ``num_inference_steps + 1`` values, from 1 to 0."""


@dataclass(frozen=True)
class Schedule:
    """Noise levels of T steps: ``sigmas`` has T + 1 values in float64, from 1 down to 0."""

    sigmas: Tensor

    def __post_init__(self) -> None:
        """Refuse what no trajectory can follow.

        Raises:
            ValueError: fewer than two levels, a level outside [0, 1], or levels that do not fall.
        """
        sigmas = self.sigmas
        if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas.dtype != torch.float64:
            raise ValueError("a schedule is a float64 vector of at least two noise levels")
        if bool((sigmas.diff() >= 0).any()) or sigmas[0] > 1 or sigmas[-1] < 0:
            raise ValueError(f"noise levels must fall from 1 to 0, got {sigmas.tolist()}")

    @property
    def steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    @property
    def dt_T(self) -> Tensor:
        """sigma_{k+1} - sigma_k, negative."""
        return self.sigmas.diff()


def from_scheduler(
    scheduler: SetsSigmas,
    steps: int,
    *,
    mu: float | None = None,
    sigmas: list[float] | None = None,
) -> Schedule:
    """The schedule that ``scheduler`` sets for ``steps`` steps.

    ``mu`` is the shift of resolution-dependent schedulers, ``sigmas`` the base grid of pipelines
    that pass their own.
    """
    if sigmas is None:
        scheduler.set_timesteps(steps, mu=mu)
    else:
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
    return Schedule(scheduler.sigmas.detach().to("cpu", torch.float64))
