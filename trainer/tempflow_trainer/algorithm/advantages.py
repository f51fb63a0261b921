"""Rewards to advantages: each draw against the draws it is compared with.

Groups are keyed by ids and never by the place where a draw was made, so the result does not
depend on the number of processes. Different steps are never mixed. A reward that is NaN is missing:
it counts nowhere, and its draw has no advantage.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdvantageRule:
    """``spec.algorithm.advantage``."""

    scope: str
    deviation: str
    epsilon: float
    clip_max: float
    combination: str = "raw"


@dataclass(frozen=True)
class GroupStatistics:
    """Rewards against their group, in float64."""

    centred_GSK: Tensor
    """Rewards less the mean of the group; 0 where one is missing."""
    mean_GS: Tensor
    """Of the rewards of the group; NaN without any."""
    std_GS: Tensor
    """Their population deviation; 0 without any."""


def advantages_GSK(rewards_GSK: Tensor, prompt_ids_G: Tensor, rule: AdvantageRule) -> Tensor:
    """(R - mean) / (deviation + epsilon), cut at ``clip_max``, [G, S, K] float32.

    Mean over the draws of a step that share prompt and seed (a row of ``rewards_GSK``; scope
    ``seed``) or the prompt (rows with the same id; scope ``prompt``). The population deviation
    is that of the same group, of all draws of the step, or left out.
    """
    normalised = normalised_GSK(rewards_GSK, prompt_ids_G, rule)
    return normalised.clamp(-rule.clip_max, rule.clip_max).float()


def normalised_GSK(rewards_GSK: Tensor, prompt_ids_G: Tensor, rule: AdvantageRule) -> Tensor:
    """The advantages before they are cut, float64."""
    found = statistics(rewards_GSK, keys_G(prompt_ids_G, rule.scope))
    if rule.deviation == "group":
        return found.centred_GSK / (found.std_GS[..., None] + rule.epsilon)
    if rule.deviation == "global":
        std_S = _std_S(rewards_GSK.double())
        return found.centred_GSK / (std_S[:, None] + rule.epsilon)
    return found.centred_GSK


def zero_spread_share(rewards_GSK: Tensor, prompt_ids_G: Tensor, scope: str) -> float:
    """Share of (group, step) pairs whose draws all have the same reward: they teach nothing.
    Pairs without any reward are not counted."""
    std_GS = statistics(rewards_GSK, keys_G(prompt_ids_G, scope)).std_GS
    some_GS = rewards_GSK.isfinite().any(dim=2)
    return float((std_GS == 0)[some_GS].double().mean())


def keys_G(prompt_ids_G: Tensor, scope: str) -> Tensor:
    """Rows with equal keys are compared with one another."""
    return torch.arange(len(prompt_ids_G)) if scope == "seed" else prompt_ids_G.cpu()


def statistics(rewards_GSK: Tensor, keys: Tensor) -> GroupStatistics:
    """Rewards against the others of their step in the rows that have the same key, [G]."""
    rewards = rewards_GSK.double()
    present_GSK = rewards.isfinite()
    _, group_G, rows_N = torch.unique(keys, return_inverse=True, return_counts=True)
    groups, steps = len(rows_N), rewards.shape[1]
    draws_NS = torch.zeros(groups, steps, dtype=torch.float64)
    draws_NS.index_add_(0, group_G, present_GSK.double().sum(dim=2))

    def mean_GS(values_GSK: Tensor) -> Tensor:
        sums_NS = torch.zeros(groups, steps, dtype=torch.float64)
        sums_NS.index_add_(0, group_G, values_GSK.sum(dim=2))
        means_GS: Tensor = (sums_NS / draws_NS.clamp(min=1))[group_G]
        return means_GS

    # Measured from the least reward of the group, equal rewards are exactly zero, and so are
    # their mean, their deviation and their advantages.
    least_NS = torch.full((groups, steps), torch.inf, dtype=torch.float64)
    least_GS = rewards.where(present_GSK, torch.inf).amin(dim=2)
    least_NS.scatter_reduce_(0, group_G[:, None].expand_as(least_GS), least_GS, "amin")
    above_GSK = (rewards - least_NS[group_G][..., None]).where(present_GSK, 0.0)
    mean_above_GS = mean_GS(above_GSK)
    centred_GSK = (above_GSK - mean_above_GS[..., None]).where(present_GSK, 0.0)
    some_GS = draws_NS[group_G] > 0
    return GroupStatistics(
        centred_GSK,
        (least_NS[group_G] + mean_above_GS).where(some_GS, torch.nan),
        mean_GS(centred_GSK.square()).sqrt(),
    )


def _std_S(rewards_GSK: Tensor) -> Tensor:
    """Population deviation over all draws of each step."""
    by_step = rewards_GSK.transpose(0, 1).flatten(1)
    if bool(by_step.isfinite().all()):
        return by_step.std(dim=1, correction=0)
    stds = [row[row.isfinite()].std(correction=0) for row in by_step]
    return torch.stack(stds).nan_to_num(0.0)
