"""Rewards to advantages: each draw against the draws it is compared with.

Groups are keyed by ids and never by the place where a draw was made, so the result does not
depend on the number of processes. Different steps are never mixed.
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


def advantages_GSK(rewards_GSK: Tensor, prompt_ids_G: Tensor, rule: AdvantageRule) -> Tensor:
    """(R - mean) / (deviation + epsilon), cut at ``clip_max``, [G, S, K] float32.

    Mean over the draws of a step that share prompt and seed (a row of ``rewards_GSK``; scope
    ``seed``) or the prompt (rows with the same id; scope ``prompt``). The population deviation
    is that of the same group, of all draws of the step, or left out.
    """
    centred, std_GS = _centred(rewards_GSK.double(), _keys_G(prompt_ids_G, rule.scope))
    if rule.deviation == "group":
        centred = centred / (std_GS[..., None] + rule.epsilon)
    elif rule.deviation == "global":
        std_S = rewards_GSK.double().transpose(0, 1).flatten(1).std(dim=1, correction=0)
        centred = centred / (std_S[:, None] + rule.epsilon)
    return centred.clamp(-rule.clip_max, rule.clip_max).float()


def zero_spread_share(rewards_GSK: Tensor, prompt_ids_G: Tensor, scope: str) -> float:
    """Share of (group, step) pairs whose draws all have the same reward: they teach nothing."""
    _, std_GS = _centred(rewards_GSK.double(), _keys_G(prompt_ids_G, scope))
    return float((std_GS == 0).double().mean())


def _keys_G(prompt_ids_G: Tensor, scope: str) -> Tensor:
    return torch.arange(len(prompt_ids_G)) if scope == "seed" else prompt_ids_G.cpu()


def _centred(rewards_GSK: Tensor, keys_G: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards less the mean of their group [G, S, K], and its population deviation [G, S]."""
    _, group_G, rows_N = torch.unique(keys_G, return_inverse=True, return_counts=True)
    groups, steps = len(rows_N), rewards_GSK.shape[1]
    draws_N1 = (rows_N * rewards_GSK.shape[2]).double()[:, None]

    def mean_GS(values_GSK: Tensor) -> Tensor:
        sums_NS = torch.zeros(groups, steps, dtype=torch.float64)
        sums_NS.index_add_(0, group_G, values_GSK.sum(dim=2))
        means_GS: Tensor = (sums_NS / draws_N1)[group_G]
        return means_GS

    # Measured from the least reward of the group, equal rewards are exactly zero, and so are
    # their mean, their deviation and their advantages.
    least_NS = torch.full((groups, steps), torch.inf, dtype=torch.float64)
    least_GS = rewards_GSK.amin(dim=2)
    least_NS.scatter_reduce_(0, group_G[:, None].expand_as(least_GS), least_GS, "amin")
    above_GSK = rewards_GSK - least_NS[group_G][..., None]
    centred_GSK = above_GSK - mean_GS(above_GSK)[..., None]
    return centred_GSK, mean_GS(centred_GSK.square()).sqrt()
