"""Walk a branch plan: trunk and all live branches advance together, one batch a denoising step.

Published code finishes one branch after the other; here step k is one pass over the rows of the
trunks and of every branch that stands at k: T passes instead of one for every tail, for the same
evaluations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tempflow_trainer.algorithm import sde, solvers
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.algorithm.sde import Transitions
from tempflow_trainer.models.base import Conditioning, Policy

Noise = Callable[[int], Tensor]
"""The draws' noise at a stochastic step, [G, K, C, H, W]."""


@dataclass(frozen=True)
class Rollouts:
    """Transitions of G groups, and the final latents to decode and score."""

    states_GSRCHW: Tensor
    """What each stochastic step started from: R = 1 state that its K draws share, or R = K."""
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
            torch.cat([part.states_GSRCHW for part in parts]),
            torch.cat([part.draws_GSKCHW for part in parts]),
            torch.cat([part.latents_NCHW for part in parts]),
            torch.cat(image_of),
        )


@dataclass
class _Branch:
    """The draws that left the trunk at one step, on their way to images."""

    x_GKCHW: Tensor
    route: tuple[int, ...]
    """Indices of the noise levels ahead, from where the draws are."""
    remembered: solvers.Remembered | None = None


@dataclass(frozen=True)
class Walker:
    """What stays the same over all rollouts of a run."""

    policy: Policy
    schedule: Schedule
    noise_level: float
    rows_per_call: int
    sde_kind: str = "flow"
    """Of the stochastic steps; ``sample`` makes none."""

    def transitions(self, plan: BranchPlan) -> Transitions:
        """The stochastic steps of a plan."""
        return sde.transitions(
            self.sde_kind, self.schedule, self.noise_level, plan.steps, plan.landings
        )

    def collect(
        self, plan: BranchPlan, starts_GCHW: Tensor, conditioning: Conditioning, noise: Noise
    ) -> Rollouts:
        """Roll ``plan`` out from the start noises; ``conditioning`` has one row a group."""
        groups = torch.arange(len(starts_GCHW))
        owners_B = groups[:, None].expand(-1, plan.draws).flatten()
        steps = self.transitions(plan)
        trunk, branches = starts_GCHW.float(), list[_Branch]()
        states, draws = list[Tensor](), list[Tensor]()

        def branch_out(x_GRCHW: Tensor, v_GRCHW: Tensor, k: int) -> Tensor:
            states.append(x_GRCHW)
            draws.append(_draw(x_GRCHW, v_GRCHW, steps, plan.steps.index(k), noise(k)))
            return draws[-1]

        for k in range(self.schedule.steps):
            live = [branch for branch in branches if branch.route[0] == k]
            trunk_lives = k <= plan.starts[-1]
            rows = [trunk] * trunk_lives + [branch.x_GKCHW.flatten(0, 1) for branch in live]
            if not rows:
                continue
            owners = [groups] * trunk_lives + [owners_B] * len(live)
            v = self._velocity(torch.cat(rows), k, conditioning, torch.cat(owners))
            parts = list(v.split([len(part) for part in rows]))
            v_trunk = parts.pop(0) if trunk_lives else None
            for branch, v_branch in zip(live, parts, strict=True):
                v_GKCHW = v_branch.view_as(branch.x_GKCHW)
                if plan.trunk_follows_draw and k in plan.steps:
                    branch.x_GKCHW = branch_out(branch.x_GKCHW, v_GKCHW, k)
                else:
                    self._advance(branch, v_GKCHW, plan)
                branch.route = branch.route[1:]
            if v_trunk is not None:
                if k in plan.starts:
                    drawn = branch_out(trunk[:, None], v_trunk[:, None], k)
                    branches.append(_Branch(drawn, plan.route(k)))
                trunk = sde.ode_step(trunk, v_trunk, float(self.schedule.dt_T[k]))
        return _rollouts(plan, states, draws, [branch.x_GKCHW for branch in branches])

    def _advance(self, branch: _Branch, v_GKCHW: Tensor, plan: BranchPlan) -> None:
        """The deterministic step to the next noise level of the branch's route.

        Between two stochastic steps it is of first order always: a solver that looks back would
        take the noise for curvature.
        """
        k, following = branch.route[:2]
        sigma, sigma_next = self.schedule.sigmas[[k, following]].tolist()
        if plan.tail.solver == "dpm2" and (not plan.trunk_follows_draw or k > plan.steps[-1]):
            branch.x_GKCHW, branch.remembered = solvers.dpm2_step(
                branch.x_GKCHW,
                v_GKCHW,
                sigma=sigma,
                sigma_next=sigma_next,
                before=branch.remembered,
            )
        else:
            branch.x_GKCHW = sde.ode_step(branch.x_GKCHW, v_GKCHW, sigma_next - sigma)

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


def _draw(
    x_GRCHW: Tensor, v_GRCHW: Tensor, steps: Transitions, s: int, noise_GKCHW: Tensor
) -> Tensor:
    """K draws of stochastic step s from the state that they share or from one each."""
    mean_GRCHW = sde.step_mean(
        x_GRCHW,
        v_GRCHW,
        x_factor_B=steps.x_factor_S[s : s + 1],
        v_factor_B=steps.v_factor_S[s : s + 1],
    )
    return mean_GRCHW + float(steps.noise_std_S[s]) * noise_GKCHW.to(mean_GRCHW)


def _rollouts(
    plan: BranchPlan, states: Sequence[Tensor], draws: Sequence[Tensor], final: Sequence[Tensor]
) -> Rollouts:
    groups, steps = len(draws[0]), len(plan.steps)
    images_GS1K = torch.arange(groups * plan.images_per_group).view(groups, -1, plan.draws)
    shared = [
        state.expand(-1, plan.states_per_step, -1, -1, -1) if state.shape[1] == 1 else state
        for state in states
    ]
    return Rollouts(
        torch.stack(shared, dim=1),
        torch.stack(list(draws), dim=1),
        torch.stack(list(final), dim=1).flatten(0, 2),
        images_GS1K.expand(-1, steps, -1),
    )
