"""What a rollout leaves to learn from, and the loss on it.

A row is a state with the draws made from it: of a (group, branch step) pair, one state of a trunk
with its K draws. The draws of a row share the state and so the velocity, so ONE forward and
backward serves all K of them; published code repeats it for each.
"""

from collections.abc import Callable, Iterator
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
    x_factor_B: Tensor
    v_factor_B: Tensor
    noise_std_B: Tensor
    weight_B: Tensor
    branch_B: Tensor
    """Index of the branch step, for metrics by step."""
    old_log_prob_BK: Tensor | None = None
    """Under the weights of the rollout; None where they are still the current ones."""
    old_mean_BCHW: Tensor | None = None
    """Likewise the mean of the step, where the ratio needs it."""
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
    """Flatten groups, steps and states to rows, step by step within a group."""
    groups, steps = advantages_GSK.shape[:2]
    states = plan.states_per_step
    step_B = torch.arange(steps).repeat_interleave(states).repeat(groups)
    of = walker.transitions(plan)
    return Experience(
        states_BCHW=rollouts.states_GSRCHW.flatten(0, 2),
        draws_BKCHW=rollouts.draws_GSKCHW.unflatten(2, (states, -1)).flatten(0, 2),
        advantages_BK=advantages_GSK.unflatten(2, (states, -1)).flatten(0, 2),
        group_B=torch.arange(groups).repeat_interleave(plan.rows_per_group),
        sigma_B=of.sigma_S[step_B],
        dt_B=of.dt_S[step_B],
        x_factor_B=of.x_factor_S[step_B],
        v_factor_B=of.v_factor_S[step_B],
        noise_std_B=of.noise_std_S[step_B],
        weight_B=weights_S[step_B],
        branch_B=step_B,
    )


@dataclass(frozen=True)
class Prediction:
    """What the weights say of a row: the velocity, and the mean of its stochastic step."""

    velocity_BCHW: Tensor
    mean_BCHW: Tensor


@dataclass(frozen=True)
class Objective:
    """The loss of a row, by ``spec.algorithm``."""

    clip_range: float
    kl_coefficient: float
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor] = sde.log_prob
    """Of draws, means and deviations: what the ratio is made of."""
    guarded: bool = False
    """Whether ratios are those of GRPO-Guard."""
    kl_form: str = "exact"

    def predict(
        self, batch: Experience, policy: Policy, conditioning: Conditioning, *, purpose: str
    ) -> Prediction:
        """The one forward of every row that its draws share."""
        velocity_BCHW = policy.velocity(
            batch.states_BCHW,
            batch.sigma_B.float(),
            conditioning.rows(batch.group_B),
            purpose=purpose,
        )
        mean_BCHW = sde.step_mean(
            batch.states_BCHW.to(velocity_BCHW.device),
            velocity_BCHW,
            x_factor_B=batch.x_factor_B,
            v_factor_B=batch.v_factor_B,
        )
        return Prediction(velocity_BCHW, mean_BCHW)

    def log_probs_BK(self, batch: Experience, mean_BCHW: Tensor) -> Tensor:
        """Log-probability of every draw of a row under its mean."""
        return self.log_prob(
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
        before = None
        if self.kl_coefficient > 0:
            with torch.no_grad(), tuning.reference(policy) as reference:
                before = self.predict(batch, reference, conditioning, purpose="reference")
        now = self.predict(batch, policy, conditioning, purpose="training")
        log_ratio_BK = self._log_ratio_BK(batch, now.mean_BCHW)
        policy_BK = loss.surrogate_BK(
            log_ratio_BK,
            batch.advantages_BK.to(log_ratio_BK.device),
            weight_B=batch.weight_B,
            clip_range=self.clip_range,
        )
        kl_B = torch.zeros(len(batch), device=log_ratio_BK.device)
        if before is not None:
            kl_B = self._divergence_B(batch, now, before)
        seen_BK = log_ratio_BK.detach()
        found = {
            "policy": policy_BK.mean(dim=1),
            "kl": kl_B,
            "clipped": loss.clipped_share_BK(seen_BK, self.clip_range).mean(dim=1),
            "drift": (seen_BK.exp() - 1).abs().mean(dim=1),
        }
        if batch.counts_B is not None:
            found = {name: value * batch.counts_B.to(value) for name, value in found.items()}
        return {name: value.sum() for name, value in found.items()}

    def _log_ratio_BK(self, batch: Experience, mean_BCHW: Tensor) -> Tensor:
        log_prob_BK = self.log_probs_BK(batch, mean_BCHW)
        old_BK = batch.old_log_prob_BK
        old_BK = log_prob_BK.detach() if old_BK is None else old_BK.to(log_prob_BK.device)
        if not self.guarded:
            return log_prob_BK - old_BK
        old_mean = mean_BCHW.detach() if batch.old_mean_BCHW is None else batch.old_mean_BCHW
        return loss.guarded_log_ratio_BK(
            log_prob_BK - old_BK, mean_BCHW, old_mean.to(mean_BCHW.device), batch.noise_std_B
        )

    def _divergence_B(self, batch: Experience, now: Prediction, before: Prediction) -> Tensor:
        """``spec.algorithm.klForm``."""
        if self.kl_form == "velocity":
            return loss.velocity_distance_B(now.velocity_BCHW, before.velocity_BCHW)
        if self.kl_form == "no-dt":
            return loss.kl_without_dt_B(
                now.mean_BCHW, before.mean_BCHW, batch.noise_std_B, batch.dt_B
            )
        return loss.kl_B(now.mean_BCHW, before.mean_BCHW, batch.noise_std_B)

    @torch.no_grad()
    def with_old_log_probs(
        self, experience: Experience, policy: Policy, conditioning: Conditioning, rows_per_call: int
    ) -> Experience:
        """The rows with their log-probabilities under the weights now.

        Computed by the very forward that training uses, in the same micro-batches: the value of
        the rollout, from other batch shapes, would differ by rounding as large as the clip range
        in half precision.
        """
        log_probs, means = list[Tensor](), list[Tensor]()
        for batch in experience.micro_batches(rows_per_call):
            old = self.predict(batch, policy, conditioning, purpose="training")
            log_probs.append(self.log_probs_BK(batch, old.mean_BCHW).cpu())
            if self.guarded:
                means.append(old.mean_BCHW.cpu())
        return replace(
            experience,
            old_log_prob_BK=torch.cat(log_probs),
            old_mean_BCHW=torch.cat(means) if self.guarded else None,
        )
