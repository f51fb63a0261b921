"""Walk a branch plan: trunk and all live branches advance together, one batch a denoising step.

Published code finishes one branch after the other; here step k is one pass over the rows of the
trunks and of every branch made before k: T passes instead of one for every tail, for the same
evaluations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tempflow_trainer.algorithm import sde
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.models.base import Conditioning, Policy

Noise = Callable[[int], Tensor]
"""The draws' noise at a branch step, [G, K, C, H, W]."""


@dataclass(frozen=True)
class Rollouts:
    """Transitions of G groups, and the final latents to decode and score."""

    states_GSCHW: Tensor
    """The trunk at each branch step."""
    draws_GSKCHW: Tensor
    """What the stochastic step made of it."""
    latents_NCHW: Tensor
    """Final latents; N = G x images per group."""
    image_of_GSK: Tensor
    """Which of the N images a draw's reward is read from."""

    def rewards_GSK(self, rewards_N: Tensor) -> Tensor:
        """Rewards of the images, credited to the draws."""
        return rewards_N[self.image_of_GSK]

    @classmethod
    def joined(cls, parts: Sequence["Rollouts"]) -> "Rollouts":
        """Rollouts of groups that follow one another, as one."""
        if len(parts) == 1:
            return parts[0]
        firsts = [0, *accumulate(len(part.latents_NCHW) for part in parts)]
        image_of = [part.image_of_GSK + n for part, n in zip(parts, firsts, strict=False)]
        return cls(
            torch.cat([part.states_GSCHW for part in parts]),
            torch.cat([part.draws_GSKCHW for part in parts]),
            torch.cat([part.latents_NCHW for part in parts]),
            torch.cat(image_of),
        )


@dataclass(frozen=True)
class Walker:
    """What stays the same over all rollouts of a run."""

    policy: Policy
    schedule: Schedule
    noise_level: float
    rows_per_call: int

    def collect(
        self, plan: BranchPlan, starts_GCHW: Tensor, conditioning: Conditioning, noise: Noise
    ) -> Rollouts:
        """Roll ``plan`` out from the start noises; ``conditioning`` has one row a group."""
        groups = torch.arange(len(starts_GCHW))
        groups_GK = groups[:, None].expand(-1, plan.draws)
        trunk, states, draws = starts_GCHW.float(), [], []
        tails: list[Tensor] = []
        for k in range(self.schedule.steps):
            trunk_lives = plan.trunk_follows_draw or k <= plan.steps[-1]
            live = [tail.flatten(0, 1) for tail in tails]
            owners = [groups_GK.flatten()] * len(live)
            if trunk_lives:
                live, owners = [trunk, *live], [groups, *owners]
            v = self._velocity(torch.cat(live), k, conditioning, torch.cat(owners))
            v_trunk, v_tails = (v[: len(trunk)], v[len(trunk) :]) if trunk_lives else (v[:0], v)
            dt = float(self.schedule.dt_T[k])
            tails = [
                sde.ode_step(tail, v_tail.view_as(tail), dt)
                for tail, v_tail in zip(tails, v_tails.split(groups_GK.numel()), strict=False)
            ]
            if k in plan.steps:
                states.append(trunk)
                draws.append(self._draw(trunk, v_trunk, k, noise(k)))
                if not plan.trunk_follows_draw:
                    tails.append(draws[-1])
            if trunk_lives:
                follows_draw = plan.trunk_follows_draw and k in plan.steps
                trunk = draws[-1][:, 0] if follows_draw else sde.ode_step(trunk, v_trunk, dt)
        return self._rollouts(plan, trunk, states, draws, tails)

    def sample(
        self, starts_BCHW: Tensor, conditioning: Conditioning, *, purpose: str = "evaluation"
    ) -> Tensor:
        """Final latents of deterministic trajectories."""
        x, owners = starts_BCHW.float(), torch.arange(len(starts_BCHW))
        for k in range(self.schedule.steps):
            v = self._velocity(x, k, conditioning, owners, purpose)
            x = sde.ode_step(x, v, float(self.schedule.dt_T[k]))
        return x

    @torch.no_grad()
    def _velocity(
        self,
        x_BCHW: Tensor,
        k: int,
        conditioning: Conditioning,
        owner_B: Tensor,
        purpose: str = "rollout",
    ) -> Tensor:
        velocity_BCHW = torch.empty_like(x_BCHW)
        for rows in torch.arange(len(x_BCHW)).split(self.rows_per_call):
            sigma_B = self.schedule.sigmas[k].float().expand(len(rows))
            velocity_BCHW[rows] = self.policy.velocity(
                x_BCHW[rows], sigma_B, conditioning.rows(owner_B[rows]), purpose=purpose
            ).to(x_BCHW.device)
        return velocity_BCHW

    def _draw(self, x_GCHW: Tensor, v_GCHW: Tensor, k: int, noise_GKCHW: Tensor) -> Tensor:
        """K draws from the stochastic step k of each trunk, [G, K, C, H, W]."""
        mean_GCHW = sde.step_mean(
            x_GCHW,
            v_GCHW,
            sigma_B=self.schedule.sigmas[k : k + 1],
            dt_B=self.schedule.dt_T[k : k + 1],
            diffusion_B=sde.diffusion_T(self.schedule, self.noise_level)[k : k + 1],
        )
        std = float(sde.noise_std_T(self.schedule, self.noise_level)[k])
        return mean_GCHW[:, None] + std * noise_GKCHW.to(mean_GCHW)

    @staticmethod
    def _rollouts(
        plan: BranchPlan,
        trunk: Tensor,
        states: Sequence[Tensor],
        draws: Sequence[Tensor],
        tails: Sequence[Tensor],
    ) -> Rollouts:
        groups = len(trunk)
        if plan.trunk_follows_draw:
            latents = trunk
            image_of_GSK = torch.arange(groups).view(-1, 1, 1).expand(-1, len(plan.steps), 1)
        else:
            latents = torch.stack(list(tails), dim=1).flatten(0, 2)
            image_of_GSK = torch.arange(len(latents)).view(groups, len(plan.steps), plan.draws)
        return Rollouts(
            torch.stack(list(states), dim=1), torch.stack(list(draws), dim=1), latents, image_of_GSK
        )
