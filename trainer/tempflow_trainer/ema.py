"""An exponential average of the trained weights."""

from collections.abc import Mapping

import torch
from torch import nn


class Ema:
    """avg <- d avg + (1 - d) weights, with d = min(decay, (1 + s) / (10 + s)) after s updates.

    The schedule is that of Flow-GRPO's code: early on the average follows quickly.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, decay: float, every_updates: int
    ) -> None:
        """Starts at the weights as they are."""
        self.values = {name: p.detach().clone() for name, p in parameters.items()}
        self._decay, self._every = decay, every_updates

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], updates_done: int) -> None:
        """Follow the weights after ``updates_done`` optimizer steps, if it is time to."""
        if updates_done % self._every:
            return
        decay = min(self._decay, (1 + updates_done) / (10 + updates_done))
        for name, average in self.values.items():
            average.lerp_(parameters[name], 1 - decay)
