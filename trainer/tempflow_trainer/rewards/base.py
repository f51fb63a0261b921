"""Scorers, and the reward that is their weighted sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tempflow_api.errors import RewardFailed


class Scorer(Protocol):
    """What a reward has to offer."""

    @property
    def batch_size(self) -> int:
        """Most images in one call."""

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        """One number an image, [N]; higher is better. Images are float32 in [0, 1]."""


@dataclass(frozen=True)
class Term:
    """A scorer, what it is called, and its share in the reward."""

    name: str
    weight: float
    scorer: Scorer


@dataclass(frozen=True)
class Reward:
    """The weighted sum of raw scores. Terms of weight 0 are held out: only evaluations see them."""

    terms: Sequence[Term]

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
        *,
        held_out: bool = False,
    ) -> dict[str, Tensor]:
        """Scores by name, each [N] float32 on the CPU.

        Raises:
            RewardFailed: a scorer that fails, gives another number of scores, or one that is not
                finite. A failed score is never counted as zero.
        """
        terms = [term for term in self.terms if held_out or term.weight != 0]
        return {term.name: _scores(term, images_N3HW, prompts, metadata) for term in terms}

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the trained terms, [N]."""
        weighted = [term.weight * scores[term.name] for term in self.terms if term.weight != 0]
        return torch.stack(weighted).sum(dim=0)


def _scores(
    term: Term,
    images_N3HW: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, object]],
) -> Tensor:
    size = term.scorer.batch_size
    parts = []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        try:
            part = term.scorer.score(images_N3HW[rows], prompts[rows], metadata[rows])
        except (ValueError, RuntimeError, OSError) as error:
            raise RewardFailed(f"reward {term.name}: {error}") from error
        if part.shape != (len(prompts[rows]),):
            raise RewardFailed(
                f"reward {term.name} gave scores of shape {list(part.shape)}, expected one score "
                f"for each of {len(prompts[rows])} images"
            )
        parts.append(part.detach().float().cpu())
    scores = torch.cat(parts)
    broken = (~scores.isfinite()).nonzero().flatten()
    if len(broken):
        index = int(broken[0])
        raise RewardFailed(
            f"reward {term.name} gave {float(scores[index])} for an image of prompt "
            f"{prompts[index]!r}; a score must be finite"
        )
    return scores
