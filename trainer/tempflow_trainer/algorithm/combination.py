"""Several rewards, one advantage; and what follows from a score that is missing.

A missing score of a required reward takes the draws that it is compared with out of the update.
A missing score of another reward counts as the mean of the group in that reward, so it moves no
draw up or down: it is masked, and never a zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow_trainer.algorithm import advantages
from tempflow_trainer.algorithm.advantages import AdvantageRule


@dataclass(frozen=True)
class Component:
    """One reward of every draw."""

    scores_GSK: Tensor
    """NaN where the score is missing."""
    weight: float
    required: bool


@dataclass(frozen=True)
class Combined:
    """What the draws of all ranks are worth."""

    advantages_GSK: Tensor
    """float32; 0 for groups that are left out."""
    kept_GS: Tensor
    """Whether a group of draws takes part in the update."""
    rewards_GSK: Tensor
    """Weighted sums of raw scores of the groups that are kept; NaN elsewhere."""
    zero_share: float
    """Share of the kept (group, step) pairs whose draws are all worth the same."""


def combine(
    components: Sequence[Component], prompt_ids_G: Tensor, rule: AdvantageRule
) -> Combined | None:
    """Advantages of all draws by ``rule``; None if no group has all its required scores.

    With ``raw`` the weighted sum of scores is normalised. With ``normalised`` each reward is, and
    then summed by weight, as in GDPO (arXiv 2601.05242), but for its last normalisation over the
    batch: the weights would lose their scale.
    """
    keys = advantages.keys_G(prompt_ids_G, rule.scope)
    kept_GS = complete_GS(components, keys)
    if not bool(kept_GS.any()):
        return None
    rewards_GSK = total_GSK(components, keys).where(kept_GS[..., None], torch.nan)
    if rule.combination == "raw":
        found_GSK = advantages.advantages_GSK(rewards_GSK, prompt_ids_G, rule)
        zero_share = advantages.zero_spread_share(rewards_GSK, prompt_ids_G, rule.scope)
        return Combined(found_GSK, kept_GS, rewards_GSK, zero_share)
    summed_GSK = torch.zeros(rewards_GSK.shape, dtype=torch.float64)
    flat_GS = kept_GS.clone()
    for component in components:
        scores_GSK = component.scores_GSK.where(kept_GS[..., None], torch.nan)
        summed_GSK += component.weight * advantages.normalised_GSK(scores_GSK, prompt_ids_G, rule)
        flat_GS &= advantages.statistics(scores_GSK, keys).std_GS == 0
    found_GSK = summed_GSK.clamp(-rule.clip_max, rule.clip_max).float()
    zero_share = float(flat_GS[kept_GS].double().mean())
    return Combined(found_GSK, kept_GS, rewards_GSK, zero_share)


def complete_GS(components: Sequence[Component], keys: Tensor) -> Tensor:
    """Whether every draw that a (group, step) pair is compared with has its required scores."""
    lacks_GS = torch.zeros(components[0].scores_GSK.shape[:2], dtype=torch.bool)
    for component in components:
        if component.required:
            lacks_GS |= component.scores_GSK.isnan().any(dim=2)
    _, group_G = torch.unique(keys, return_inverse=True)
    lacking_NS = torch.zeros(int(group_G.max()) + 1, lacks_GS.shape[1], dtype=torch.long)
    return lacking_NS.index_add_(0, group_G, lacks_GS.long())[group_G] == 0


def total_GSK(components: Sequence[Component], keys: Tensor) -> Tensor:
    """The weighted sum of scores, float32; NaN where a required one is missing.

    One that is missing and not required counts as the mean of its group in that reward; without
    any score in the group as the mean of all groups; without any score at all it has no share.
    """
    weighted = [
        component.weight
        * (component.scores_GSK if component.required else _filled(component.scores_GSK, keys))
        for component in components
    ]
    return torch.stack(weighted).sum(dim=0)


def _filled(scores_GSK: Tensor, keys: Tensor) -> Tensor:
    mean_of_all = float(scores_GSK.double().nanmean().nan_to_num(0.0))
    mean_GS = advantages.statistics(scores_GSK, keys).mean_GS.nan_to_num(mean_of_all)
    return scores_GSK.where(scores_GSK.isfinite(), mean_GS[..., None].to(scores_GSK.dtype))
