"""TempFlow-GRPO, top to bottom: the algorithm box of the paper as code.

One epoch draws trajectories, scores them, turns scores into advantages and takes one or more
optimizer steps. What differs between models, rewards and variants is in the parts of ``Run``.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempflow_api.errors import Preempted, TrainingDiverged
from tempflow_trainer import experience as ex
from tempflow_trainer import seeds
from tempflow_trainer.algorithm import advantages
from tempflow_trainer.algorithm.advantages import AdvantageRule
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.algorithm.exploration import Exploration
from tempflow_trainer.data import Group, PromptOrder
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.ema import Ema
from tempflow_trainer.experience import Experience, Objective
from tempflow_trainer.metrics import Stopwatch
from tempflow_trainer.models.base import Conditioning, Policy
from tempflow_trainer.models.tuning import Tuning
from tempflow_trainer.rewards.base import Reward
from tempflow_trainer.rollout import Walker

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that an epoch needs; assembled once, in ``main.py``."""

    ranks: Ranks
    policy: Policy
    tuning: Tuning
    optimizer: torch.optim.Optimizer
    ema: Ema
    order: PromptOrder
    exploration: Exploration
    """Which steps are stochastic in an epoch, and their weights in the policy loss."""
    walker: Walker
    reward: Reward
    advantage_rule: AdvantageRule
    objective: Objective
    latent_shape: tuple[int, int, int]
    run_seed: int
    rows_per_training_call: int
    max_grad_norm: float
    clock: Stopwatch
    stop_requested: Callable[[], bool]
    updates_done: int = 0

    def check_stop(self) -> None:
        """A point where all ranks may stop together.

        Raises:
            Preempted: on every rank, when one was asked to stop.
        """
        if self.ranks.any(self.stop_requested()):
            raise Preempted("asked to stop")


def run_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """One round of rollout, scoring and update; returns its metrics, the same on every rank.

    Until the update begins nothing has changed, so an epoch that is stopped before can be
    repeated exactly.

    Raises:
        Preempted: stopped before the update.
        TrainingDiverged: a loss or gradient that is not finite; no step is taken with it.
    """
    run.check_stop()
    plan = run.exploration.plan(epoch)
    shares = run.order.shares(epoch, rank=run.ranks.rank, world=run.ranks.world)
    groups = [group for share in shares for group in share]
    with run.clock("rollout"):
        conditioning = _encode(run, groups)
        starts_GCHW, noise = _randomness(run, epoch, groups, plan)
        rollouts = run.walker.collect(plan, starts_GCHW, conditioning, noise)
    run.check_stop()
    with run.clock("scoring"):
        scores = _score(run, rollouts.latents_NCHW, groups, plan)
        rewards_GSK = rollouts.rewards_GSK(run.reward.total(scores))
    run.check_stop()
    with run.clock("update"):
        all_rewards_GSK, advantages_GSK, zero_share = _advantages(run, rewards_GSK, groups)
        weights_S = run.exploration.weights_S(plan)
        learned = ex.of_rollouts(rollouts, advantages_GSK, plan, run.walker, weights_S)
        parts = learned_by_share(learned, shares, plan.rows_per_group)
        if len(parts) > 1:
            parts = [
                run.objective.with_old_log_probs(
                    part, run.policy, conditioning, run.rows_per_training_call
                )
                for part in parts
            ]
        steps = [update(run, part, conditioning) for part in parts]
    return {
        "reward": float(all_rewards_GSK.mean()),
        "rewardStd": float(all_rewards_GSK.std(correction=0)),
        "rewards": {
            name: float(torch.cat(run.ranks.gather_rows(values)).mean())
            for name, values in scores.items()
        },
        "advantageZeroShare": zero_share,
        **{name: sum(step[name] for step in steps) / len(steps) for name in steps[0]},
    }


def update(run: Run, part: Experience, conditioning: Conditioning) -> dict[str, float]:
    """One optimizer step on the mean loss over all rows of all ranks; returns its metrics."""
    run.optimizer.zero_grad(set_to_none=False)
    sums: dict[str, Tensor] = {}
    rows = torch.tensor(float(len(part)), dtype=torch.float64)
    run.ranks.sum_([rows])
    for batch in part.micro_batches(run.rows_per_training_call):
        found = run.objective.loss_sums(batch, run.policy, conditioning, run.tuning)
        loss = found["policy"] + run.objective.kl_coefficient * found["kl"]
        (loss / float(rows)).backward()
        for name, value in found.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach().cpu()
    parameters = list(run.tuning.parameters().values())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    run.ranks.sum_([p.grad for p in parameters if p.grad is not None])
    run.ranks.sum_(sums.values())
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
    if not bool(norm.isfinite()):
        raise TrainingDiverged(
            f"the gradient norm is {float(norm)} at update {run.updates_done + 1}; lower "
            "spec.optimizer.learningRate, or continue from an earlier checkpoint"
        )
    run.optimizer.step()
    run.updates_done += 1
    run.ema.update(run.tuning.parameters(), run.updates_done)
    mean = {name: float(value) / float(rows) for name, value in sums.items()}
    return {
        "loss": mean["policy"] + run.objective.kl_coefficient * mean["kl"],
        "kl": mean["kl"],
        "ratioClippedShare": mean["clipped"],
        "ratioDrift": mean["drift"],
        "gradNorm": float(norm),
    }


def learned_by_share(
    learned: Experience, shares: Sequence[Sequence[Group]], rows_per_group: int
) -> list[Experience]:
    """The rows of each update: its groups are consecutive."""
    rows = torch.arange(len(learned)).split([len(share) * rows_per_group for share in shares])
    return [learned.rows(index) for index in rows]


def _encode(run: Run, groups: Sequence[Group]) -> Conditioning:
    """One row a group; each prompt is read once."""
    texts = list(dict.fromkeys(group.prompt.text for group in groups))
    index_G = torch.tensor([texts.index(group.prompt.text) for group in groups])
    return run.policy.model.encode(texts).rows(index_G)


def _randomness(
    run: Run, epoch: int, groups: Sequence[Group], plan: BranchPlan
) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Start noises [G, C, H, W], and the noise of a branch step [G, K, C, H, W].

    Named by what they are for, so they do not depend on which rank draws them.
    """

    def draw(group: Group, *purpose: int | str) -> Tensor:
        return seeds.normal(
            run.latent_shape, run.run_seed, epoch, group.position, group.seed, *purpose
        )

    def noise(step: int) -> Tensor:
        return torch.stack(
            [
                torch.stack([draw(group, "branch", step, k) for k in range(plan.draws)])
                for group in groups
            ]
        )

    return torch.stack([draw(group, "start") for group in groups]), noise


def _score(
    run: Run, latents_NCHW: Tensor, groups: Sequence[Group], plan: BranchPlan
) -> dict[str, Tensor]:
    """Decode and score, a call's rows at a time, so that images never pile up."""
    owners = [group for group in groups for _ in range(plan.images_per_group)]
    parts: list[dict[str, Tensor]] = []
    for rows in torch.arange(len(owners)).split(run.walker.rows_per_call):
        images = run.policy.model.decode(latents_NCHW[rows]).cpu()
        prompts = [owners[i].prompt for i in rows.tolist()]
        parts.append(
            run.reward.score(images, [p.text for p in prompts], [p.metadata for p in prompts])
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _advantages(
    run: Run, rewards_GSK: Tensor, groups: Sequence[Group]
) -> tuple[Tensor, Tensor, float]:
    """Rewards of all ranks, this rank's advantages, and the share of groups without spread."""
    ids_G = torch.tensor([group.prompt.id for group in groups])
    by_rank = run.ranks.gather_rows(rewards_GSK)
    every_GSK, every_id_G = torch.cat(by_rank), torch.cat(run.ranks.gather_rows(ids_G))
    before = sum(len(part) for part in by_rank[: run.ranks.rank])
    mine = slice(before, before + len(groups))
    rule = run.advantage_rule
    return (
        every_GSK,
        advantages.advantages_GSK(every_GSK, every_id_G, rule)[mine],
        advantages.zero_spread_share(every_GSK, every_id_G, rule.scope),
    )
