"""What a rollout leaves to learn from, and the loss on it.

A row is a (group, branch step) pair: one state of a trunk with its K draws. The draws of a row
share the state and so the velocity, so ONE forward and backward serves all K of them; published
code repeats it for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempflow_trainer.algorithm import loss, sde
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.models.base import Conditioning, Policy
from tempflow_trainer.models.tuning import Tuning
from tempflow_trainer.rollout import Rollouts, Walker


@dataclass(frozen=True)
class Experience:
    """Rows of transitions with everything that the loss reads; B counts rows here."""

    states_BCHW: Tensor
    draws_BKCHW: Tensor
    advantages_BK: Tensor
    group_B: Tensor
    """Row of the conditioning."""
    sigma_B: Tensor
    dt_B: Tensor
    diffusion_B: Tensor
    noise_std_B: Tensor
    weight_B: Tensor
    branch_B: Tensor
    """Index of the branch step, for metrics by step."""
    old_log_prob_BK: Tensor | None = None
    """Under the weights of the rollout; None where they are still the current ones."""
    counts_B: Tensor | None = None
    """1 for rows that are learned from and 0 for those that are left out, which are computed all
    the same: with sharded weights every rank has to make as many calls. None if all count."""

    @property
    def counted(self) -> float:
        """How many rows are learned from."""
        return float(len(self) if self.counts_B is None else self.counts_B.sum())

    def __len__(self) -> int:
        return len(self.states_BCHW)

    def rows(self, index_B: Tensor) -> "Experience":
        """A part of the rows."""
        tensors = {name: value[index_B] for name, value in vars(self).items() if value is not None}
        return replace(self, **tensors)

    def micro_batches(self, rows_per_call: int) -> Iterator["Experience"]:
        """All rows in order, at most ``rows_per_call`` at a time."""
        for index_B in torch.arange(len(self)).split(rows_per_call):
            yield self.rows(index_B)


def of_rollouts(
    rollouts: Rollouts, advantages_GSK: Tensor, plan: BranchPlan, walker: Walker, weights_S: Tensor
) -> Experience:
    """Flatten groups and steps to rows, step by step within a group."""
    groups, steps = advantages_GSK.shape[:2]
    step_B = torch.tensor(plan.steps).repeat(groups)
    schedule = walker.schedule
    return Experience(
        states_BCHW=rollouts.states_GSCHW.flatten(0, 1),
        draws_BKCHW=rollouts.draws_GSKCHW.flatten(0, 1),
        advantages_BK=advantages_GSK.flatten(0, 1),
        group_B=torch.arange(groups).repeat_interleave(steps),
        sigma_B=schedule.sigmas[step_B],
        dt_B=schedule.dt_T[step_B],
        diffusion_B=sde.diffusion_T(schedule, walker.noise_level)[step_B],
        noise_std_B=sde.noise_std_T(schedule, walker.noise_level)[step_B],
        weight_B=weights_S.repeat(groups),
        branch_B=torch.arange(steps).repeat(groups),
    )


@dataclass(frozen=True)
class Objective:
    """The loss of a row, by ``spec.algorithm``."""

    clip_range: float
    kl_coefficient: float

    def means(
        self, batch: Experience, policy: Policy, conditioning: Conditioning, *, purpose: str
    ) -> Tensor:
        """Mean of the stochastic step of every row: the one forward that its draws share."""
        velocity_BCHW = policy.velocity(
            batch.states_BCHW,
            batch.sigma_B.float(),
            conditioning.rows(batch.group_B),
            purpose=purpose,
        )
        return sde.step_mean(
            batch.states_BCHW.to(velocity_BCHW.device),
            velocity_BCHW,
            sigma_B=batch.sigma_B,
            dt_B=batch.dt_B,
            diffusion_B=batch.diffusion_B,
        )

    def log_probs_BK(self, batch: Experience, mean_BCHW: Tensor) -> Tensor:
        """Log-probability of every draw of a row under its mean."""
        return sde.log_prob(
            batch.draws_BKCHW.to(mean_BCHW.device),
            mean_BCHW[:, None],
            batch.noise_std_B.to(mean_BCHW.device)[:, None],
        )

    def loss_sums(
        self, batch: Experience, policy: Policy, conditioning: Conditioning, tuning: Tuning
    ) -> dict[str, Tensor]:
        """Sums over the rows of ``policy`` (mean over draws) and ``kl``, with gradient, and of
        ``clipped`` and ``drift``, the share of clipped draws and mean |ratio - 1|, without."""
        # The reference first: nothing may run between a forward and its backward where weights are
        # gathered for both.
        reference_BCHW = None
        if self.kl_coefficient > 0:
            with torch.no_grad(), tuning.reference(policy) as reference:
                reference_BCHW = self.means(batch, reference, conditioning, purpose="reference")
        mean_BCHW = self.means(batch, policy, conditioning, purpose="training")
        log_prob_BK = self.log_probs_BK(batch, mean_BCHW)
        old_BK = batch.old_log_prob_BK
        old_BK = log_prob_BK.detach() if old_BK is None else old_BK.to(log_prob_BK.device)
        policy_BK = loss.surrogate_BK(
            log_prob_BK,
            old_BK,
            batch.advantages_BK.to(log_prob_BK.device),
            weight_B=batch.weight_B,
            clip_range=self.clip_range,
        )
        kl_B = torch.zeros(len(batch), device=log_prob_BK.device)
        if reference_BCHW is not None:
            kl_B = loss.kl_B(mean_BCHW, reference_BCHW, batch.noise_std_B)
        new_BK = log_prob_BK.detach()
        found = {
            "policy": policy_BK.mean(dim=1),
            "kl": kl_B,
            "clipped": loss.clipped_share_BK(new_BK, old_BK, self.clip_range).mean(dim=1),
            "drift": ((new_BK - old_BK).exp() - 1).abs().mean(dim=1),
        }
        if batch.counts_B is not None:
            found = {name: value * batch.counts_B.to(value) for name, value in found.items()}
        return {name: value.sum() for name, value in found.items()}

    @torch.no_grad()
    def with_old_log_probs(
        self, experience: Experience, policy: Policy, conditioning: Conditioning, rows_per_call: int
    ) -> Experience:
        """The rows with their log-probabilities under the weights now.

        Computed by the very forward that training uses, in the same micro-batches: the value of
        the rollout, from other batch shapes, would differ by rounding as large as the clip range
        in half precision.
        """
        old = [
            self.log_probs_BK(
                batch, self.means(batch, policy, conditioning, purpose="training")
            ).cpu()
            for batch in experience.micro_batches(rows_per_call)
        ]
        return replace(experience, old_log_prob_BK=torch.cat(old))
