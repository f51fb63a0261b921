"""TempFlow-GRPO the plain way, to compare with: one branch step after the other, K forwards.

As in published code, a branch is completed before the trunk goes on, and training computes the
velocity of a state anew for each of its K draws. The groups walk together or one by one, as the
caller passes them; B is rows of the network, here always whole draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow_trainer.algorithm import loss, sde
from tempflow_trainer.models.base import Conditioning, Policy
from tempflow_trainer.models.tuning import Tuning
from tempflow_trainer.rollout import Walker


@dataclass(frozen=True)
class Branches:
    """The same transitions as the product's ``Rollouts``, and the final latents of the draws."""

    states_GSCHW: Tensor
    draws_GSKCHW: Tensor
    latents_GSKCHW: Tensor

    @classmethod
    def join(cls, parts: list["Branches"]) -> "Branches":
        """The groups of all parts, in order."""
        return cls(
            torch.cat([part.states_GSCHW for part in parts]),
            torch.cat([part.draws_GSKCHW for part in parts]),
            torch.cat([part.latents_GSKCHW for part in parts]),
        )


@torch.no_grad()
def roll_out(
    walker: Walker, starts_GCHW: Tensor, conditioning: Conditioning, noise_SGKCHW: Tensor
) -> Branches:
    """Branch at every step but the last; each branch is completed before the next one is made."""
    schedule, steps = walker.schedule, walker.schedule.steps
    of = sde.transitions("flow", schedule, walker.noise_level)
    draws = noise_SGKCHW.shape[2]
    owner_B = torch.arange(len(starts_GCHW)).repeat_interleave(draws)
    x_GCHW, states, branches, latents = starts_GCHW, [], [], []
    for k in range(steps - 1):
        v_GCHW = _velocity(walker, x_GCHW, k, conditioning)
        mean_GCHW = sde.step_mean(
            x_GCHW,
            v_GCHW,
            x_factor_B=of.x_factor_S[k : k + 1],
            v_factor_B=of.v_factor_S[k : k + 1],
        )
        draws_GKCHW = mean_GCHW[:, None] + float(of.noise_std_S[k]) * noise_SGKCHW[k]
        tail_BCHW = draws_GKCHW.flatten(0, 1)
        for j in range(k + 1, steps):
            v_BCHW = _velocity(walker, tail_BCHW, j, conditioning.rows(owner_B))
            tail_BCHW = sde.ode_step(tail_BCHW, v_BCHW, float(schedule.dt_T[j]))
        states.append(x_GCHW)
        branches.append(draws_GKCHW)
        latents.append(tail_BCHW.view_as(draws_GKCHW))
        x_GCHW = sde.ode_step(x_GCHW, v_GCHW, float(schedule.dt_T[k]))
    return Branches(
        torch.stack(states, dim=1), torch.stack(branches, dim=1), torch.stack(latents, dim=1)
    )


def _velocity(walker: Walker, x_BCHW: Tensor, k: int, conditioning: Conditioning) -> Tensor:
    parts = []
    for rows in torch.arange(len(x_BCHW)).split(walker.rows_per_call):
        sigma_B = walker.schedule.sigmas[k].float().expand(len(rows))
        parts.append(
            walker.policy.velocity(
                x_BCHW[rows], sigma_B, conditioning.rows(rows), purpose="rollout"
            ).to(x_BCHW.device)
        )
    return torch.cat(parts)


@dataclass(frozen=True)
class RepeatedForward:
    """Training with one forward, reference forward and backward for every single draw."""

    walker: Walker
    tuning: Tuning
    weights_S: Tensor
    clip_range: float
    kl_coefficient: float

    def backward(
        self,
        branches: Branches,
        advantages_GSK: Tensor,
        conditioning: Conditioning,
        rows_per_call: int,
    ) -> None:
        """Add the gradient of the mean loss of all draws to the parameters."""
        groups, steps, draws = advantages_GSK.shape
        for rows in _rows(groups, steps, draws, rows_per_call):
            group_B, step_B, draw_B = rows.unbind(dim=1)
            loss_B = self._loss_B(
                branches.states_GSCHW[group_B, step_B],
                branches.draws_GSKCHW[group_B, step_B, draw_B],
                advantages_GSK[group_B, step_B, draw_B],
                step_B,
                conditioning.rows(group_B),
            )
            (loss_B.sum() / advantages_GSK.numel()).backward()

    def _loss_B(
        self,
        state_BCHW: Tensor,
        draw_BCHW: Tensor,
        advantage_B: Tensor,
        step_B: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        std_B = sde.noise_std_T(self.walker.schedule, self.walker.noise_level)[step_B]
        mean_BCHW = self._mean(self.walker.policy, state_BCHW, step_B, conditioning, "training")
        log_prob_B1 = sde.log_prob(draw_BCHW, mean_BCHW, std_B)[:, None]
        loss_B1 = loss.surrogate_BK(
            log_prob_B1 - log_prob_B1.detach(),
            advantage_B[:, None],
            weight_B=self.weights_S[step_B],
            clip_range=self.clip_range,
        )
        if self.kl_coefficient == 0:
            return loss_B1[:, 0]
        with torch.no_grad(), self.tuning.reference(self.walker.policy) as reference:
            reference_BCHW = self._mean(reference, state_BCHW, step_B, conditioning, "reference")
        kl_B = loss.kl_B(mean_BCHW, reference_BCHW, std_B)
        return loss_B1[:, 0] + self.kl_coefficient * kl_B

    def _mean(
        self,
        policy: Policy,
        state_BCHW: Tensor,
        step_B: Tensor,
        conditioning: Conditioning,
        purpose: str,
    ) -> Tensor:
        of = sde.transitions("flow", self.walker.schedule, self.walker.noise_level)
        sigma_B = of.sigma_S[step_B]
        return sde.step_mean(
            state_BCHW,
            policy.velocity(state_BCHW, sigma_B.float(), conditioning, purpose=purpose).to(
                state_BCHW.device
            ),
            x_factor_B=of.x_factor_S[step_B],
            v_factor_B=of.v_factor_S[step_B],
        )


def _rows(groups: int, steps: int, draws: int, rows_per_call: int) -> Iterator[Tensor]:
    """(group, step, draw) of every draw, in order, some at a time, [B, 3]."""
    every = torch.cartesian_prod(torch.arange(groups), torch.arange(steps), torch.arange(draws))
    yield from every.split(rows_per_call)
