"""TempFlow-GRPO, top to bottom: the algorithm box of the paper as code.

One epoch draws trajectories, scores them, turns scores into advantages and takes one or more
optimizer steps. What differs between models, rewards and variants is in the parts of ``Run``.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tempflow_api.errors import Preempted, RewardFailed, TrainingDiverged
from tempflow_trainer import experience as ex
from tempflow_trainer import seeds, sharding
from tempflow_trainer.algorithm import combination
from tempflow_trainer.algorithm.advantages import AdvantageRule
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.algorithm.combination import Combined
from tempflow_trainer.algorithm.exploration import Exploration
from tempflow_trainer.data import Group, PromptOrder
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.ema import Ema
from tempflow_trainer.experience import Experience, Objective
from tempflow_trainer.metrics import Stopwatch
from tempflow_trainer.models.base import Conditioning, Policy
from tempflow_trainer.models.tuning import Tuning
from tempflow_trainer.rewards.base import Reward
from tempflow_trainer.rollout import Rollouts, Walker
from tempflow_trainer.scoring import OnCall, Scoring

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
    half_range: bool
    """Whether activations are float16, so small that gradients vanish unless they are scaled."""
    clock: Stopwatch
    stop_requested: Callable[[], bool]
    groups_per_rollout: int | None = None
    """Groups drawn at once, and scored while the next ones are drawn; None: all."""
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
        RewardFailed: a required reward failed, or no group has all its scores.
        TrainingDiverged: a loss or gradient that is not finite; no step is taken with it.
    """
    run.check_stop()
    plan = run.exploration.plan(epoch)
    shares = run.order.shares(epoch, rank=run.ranks.rank, world=run.ranks.world)
    groups = [group for share in shares for group in share]
    scoring = Scoring(run.reward.trained_names, run.ranks, run.stop_requested, run.clock)
    with run.clock("rollout"):
        conditioning = _encode(run, groups)
        rollouts = _roll_out(run, epoch, plan, groups, conditioning, scoring)
    run.check_stop()
    with run.clock("scoring"):
        scores = scoring.wait()
    run.check_stop()
    with run.clock("update"):
        combined, mine = _combine(run, rollouts, scores, groups)
        learned = ex.of_rollouts(
            rollouts,
            combined.advantages_GSK[mine],
            plan,
            run.walker,
            run.exploration.weights_S(plan),
        )
        kept_GS = combined.kept_GS[mine].repeat_interleave(plan.states_per_step, dim=1)
        parts = learned_by_share(learned, shares, kept_GS)
        if not bool(combined.kept_GS.all()):
            parts = [part for part in parts if run.ranks.any(part.counted > 0)]
        if len(parts) > 1:
            parts = [
                run.objective.with_old_log_probs(
                    part, run.policy, conditioning, run.rows_per_training_call
                )
                for part in parts
            ]
    steps = []
    for part in parts:
        with run.clock("update"):  # a phase each, so that whoever watches hears of every step
            steps.append(update(run, part, conditioning))
    kept = combined.rewards_GSK[combined.kept_GS]
    return {
        "reward": float(kept.mean()),
        "rewardStd": float(kept.std(correction=0)),
        **_scores_of_all(run, scores),
        "groupsLeftOut": int((~combined.kept_GS).sum()),
        "advantageZeroShare": combined.zero_share,
        **{name: sum(step[name] for step in steps) / len(steps) for name in steps[0]},
    }


def update(run: Run, part: Experience, conditioning: Conditioning) -> dict[str, float]:
    """One optimizer step on the mean loss over all rows of all ranks; returns its metrics."""
    run.optimizer.zero_grad(set_to_none=False)
    sums: dict[str, Tensor] = {}
    rows = torch.tensor(part.counted, dtype=torch.float64)
    run.ranks.sum_([rows])
    # A power of two, so nothing is rounded: it lifts what the means over rows and latents made
    # small, in the backward alone. A fixed one is no state that a checkpoint would have to hold.
    scale = 2.0 ** round(math.log2(float(rows) * math.prod(run.latent_shape)))
    scale = scale if run.half_range else 1.0
    for batch in part.micro_batches(run.rows_per_training_call):
        found = run.objective.loss_sums(batch, run.policy, conditioning, run.tuning)
        loss = found["policy"] + run.objective.kl_coefficient * found["kl"]
        (loss * scale / float(rows)).backward()
        for name, value in found.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach().cpu()
    parameters = list(run.tuning.parameters().values())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(scale)
    if not run.tuning.sharded:  # else the backward has summed them
        run.ranks.sum_([p.grad for p in parameters if p.grad is not None])
    run.ranks.sum_(sums.values())
    norm = sharding.clip_gradients(parameters, run.max_grad_norm)
    if not bool(norm.isfinite()):
        remedy = "; or set spec.model.precision to bfloat16" if run.half_range else ""
        raise TrainingDiverged(
            f"the gradient norm is {float(norm)} at update {run.updates_done + 1}; lower "
            f"spec.optimizer.learningRate, or continue from an earlier checkpoint{remedy}"
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
    learned: Experience, shares: Sequence[Sequence[Group]], kept_GS: Tensor
) -> list[Experience]:
    """The rows of each update: its groups are consecutive. Rows that are not kept do not
    count."""
    if not bool(kept_GS.all()):
        learned = replace(learned, counts_B=kept_GS.flatten().float())
    sizes = [len(share) * kept_GS.shape[1] for share in shares]
    return [learned.rows(index_B) for index_B in torch.arange(len(learned)).split(sizes)]


def _encode(run: Run, groups: Sequence[Group]) -> Conditioning:
    """One row a group; each prompt is read once."""
    texts = list(dict.fromkeys(group.prompt.text for group in groups))
    index_G = torch.tensor([texts.index(group.prompt.text) for group in groups])
    return run.policy.text.encode(texts).rows(index_G)


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


def _roll_out(
    run: Run,
    epoch: int,
    plan: BranchPlan,
    groups: Sequence[Group],
    conditioning: Conditioning,
    scoring: Scoring,
) -> Rollouts:
    """Trajectories of all groups; what is finished is scored while the next ones are drawn."""
    parts: list[Rollouts] = []
    for index_G in torch.arange(len(groups)).split(run.groups_per_rollout or len(groups)):
        some = [groups[i] for i in index_G.tolist()]
        starts_GCHW, noise = _randomness(run, epoch, some, plan)
        part = run.walker.collect(plan, starts_GCHW, conditioning.rows(index_G), noise)
        latents = part.latents_NCHW
        scoring.submit(len(latents), partial(_score, run, plan, latents, some))
        parts.append(part)
    return Rollouts.joined(parts)


def _score(
    run: Run,
    plan: BranchPlan,
    latents_NCHW: Tensor,
    groups: Sequence[Group],
    on_call: OnCall,
) -> dict[str, Tensor]:
    """Decode and score, a call's rows at a time, so that images never pile up."""
    owners = [group for group in groups for _ in range(plan.images_per_group)]
    at_a_time = run.walker.rows_per_call
    if run.reward.group_wise:  # whole sets of draws, which stand one after the other
        at_a_time = max(1, at_a_time // plan.draws) * plan.draws
    parts: list[dict[str, Tensor]] = []
    for rows in torch.arange(len(owners)).split(at_a_time):
        prompts = [owners[i].prompt for i in rows.tolist()]
        parts.append(
            run.reward.score(
                run.policy.decode(latents_NCHW[rows]),  # named here, they would outlive the call
                [p.text for p in prompts],
                [p.metadata for p in prompts],
                groups=(rows // plan.draws).tolist(),
                on_call=on_call,
            )
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _combine(
    run: Run, rollouts: Rollouts, scores: Mapping[str, Tensor], groups: Sequence[Group]
) -> tuple[Combined, slice]:
    """Advantages over the draws of all ranks, and which of their groups are this rank's.

    Raises:
        RewardFailed: on every rank, when no group has all its required scores.
    """
    names = [term.name for term in run.reward.trained]
    scores_GSKR = torch.stack([rollouts.rewards_GSK(scores[name]) for name in names], dim=3)
    by_rank = run.ranks.gather_rows(scores_GSKR)
    ids_G = torch.tensor([group.prompt.id for group in groups])
    every_id_G = torch.cat(run.ranks.gather_rows(ids_G))
    components = run.reward.components(dict(zip(names, torch.cat(by_rank).unbind(3), strict=True)))
    combined = combination.combine(components, every_id_G, run.advantage_rule)
    if combined is None:
        raise RewardFailed(
            "no group of draws has all its required scores in this epoch, so there is nothing to "
            "learn from; see the log for the reasons, or set required: false for a reward that "
            "may be absent"
        )
    before = sum(len(part) for part in by_rank[: run.ranks.rank])
    return combined, slice(before, before + len(groups))


def _scores_of_all(run: Run, scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """Over the images of all ranks: each reward's mean, and how many images it failed with."""
    gathered = {name: torch.cat(run.ranks.gather_rows(scores[name])) for name in scores}
    return {
        "rewards": {
            name: float(values[values.isfinite()].mean())
            for name, values in gathered.items()
            if bool(values.isfinite().any())
        },
        "missingScores": {name: int(values.isnan().sum()) for name, values in gathered.items()},
    }
