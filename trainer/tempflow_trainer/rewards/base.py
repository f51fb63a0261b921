"""What a scorer is, and how a job's scorers are asked.

A scorer is any object with ``batch_size`` and ``score``; see ``Scorer``. ``Reward`` holds those of
a job: it cuts what it is given into calls, and checks every answer. A score is a finite number, or
it is missing for a reason; it is never made up.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tempflow_api.errors import RewardFailed, TempFlowError
from tempflow_trainer.algorithm.combination import Component

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a scorer runs. One whose constructor has a parameter ``place`` is given it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cache: Path = Path("models")
    """A folder of this run, for files that are fetched."""


@dataclass(frozen=True)
class Scores:
    """An answer in which some images have no score: what a scorer returns instead of a tensor
    when it knows that it failed with an image, for instance because a server refused it.

    A number that is not finite and has no reason here is no missing score but a broken scorer.
    """

    values_N: Tensor
    """Anything may stand where the score is missing."""
    failed: Mapping[int, str]
    """Why there is none, by index of the image within the call."""


class Scorer(Protocol):
    """What a reward has to offer.

    A scorer is point-wise: the score of an image depends on that image, its prompt and metadata
    alone. One with an attribute ``group_wise = True`` compares: each call has the images of
    exactly one group. In training these are the draws of one (prompt, seed, branch step), in an
    evaluation the images of one prompt.
    """

    @property
    def batch_size(self) -> int:
        """Most images in one call; of a group-wise scorer the largest group."""

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor | Scores:
        """One number an image, [N]; higher is better.

        Images are float32 in [0, 1] on the CPU. ``metadata`` has the further keys of a prompt's
        line in the prompt file.

        Any exception means that no image of the call has a score.
        """


def is_group_wise(scorer: Scorer) -> bool:
    """Whether the scorer compares the images of a group."""
    return bool(getattr(scorer, "group_wise", False))


@dataclass(frozen=True)
class Term:
    """A scorer, what it is called, and its share in the reward."""

    name: str
    weight: float
    scorer: Scorer
    required: bool = True
    """Whether an image without this score teaches nothing; else the others decide."""


@dataclass(frozen=True)
class Reward:
    """The scorers of a job. Terms of weight 0 are held out: only evaluations see them."""

    terms: Sequence[Term]

    @property
    def trained(self) -> list[Term]:
        """The terms that are not held out."""
        return [term for term in self.terms if term.weight != 0]

    @property
    def trained_names(self) -> list[str]:
        """Their names."""
        return [term.name for term in self.trained]

    @property
    def group_wise(self) -> bool:
        """Whether any scorer compares the images of a group."""
        return any(is_group_wise(term.scorer) for term in self.terms)

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
        *,
        groups: Sequence[int] | None = None,
        held_out: bool = False,
        on_call: Callable[[str, int], None] = lambda _name, _images: None,
    ) -> dict[str, Tensor]:
        """Scores by name, each [N] float32 on the CPU; NaN where one is missing.

        Images are uint8, or floats in [0, 1]. ``groups`` names the group of each image, for
        scorers that compare; a group is never split over two calls of this. ``on_call`` hears the
        reward that is asked next, with 0, and the images of each call that is done.

        Raises:
            RewardFailed: a scorer gives another number of scores; a required one fails as a
                whole, or gives a score that is not finite without a reason. A failed score is
                never counted as zero.
        """
        try:
            images = as_floats(images_N3HW)
        except ValueError as error:
            raise RewardFailed(f"nothing to score: {error}") from error
        terms = self.terms if held_out else self.trained
        return {
            term.name: _scores(term, images, prompts, metadata, groups, on_call) for term in terms
        }

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the trained terms, of any shape; NaN where one is missing."""
        return torch.stack([term.weight * scores[term.name] for term in self.trained]).sum(dim=0)

    def components(self, scores: Mapping[str, Tensor]) -> list[Component]:
        """The trained terms with their scores, [G, S, K], for what combines them."""
        return [Component(scores[t.name], t.weight, t.required) for t in self.trained]


def as_floats(images_N3HW: Tensor) -> Tensor:
    """Images as every scorer gets them: float32 in [0, 1] on the CPU, from those or from uint8.

    Raises:
        ValueError: another shape, type or range.
    """
    if images_N3HW.ndim != 4 or images_N3HW.shape[1] != 3:
        raise ValueError(f"images of shape {list(images_N3HW.shape)}, expected [N, 3, H, W]")
    if images_N3HW.dtype == torch.uint8:
        return images_N3HW.cpu().float() / 255
    if not images_N3HW.is_floating_point():
        raise ValueError(f"images of {images_N3HW.dtype}, expected uint8 or floats in [0, 1]")
    images = images_N3HW.detach().float().cpu()
    if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = float(images.min()), float(images.max())
        raise ValueError(f"images from {low} to {high}, expected floats in [0, 1] (or uint8)")
    return images


def as_bytes(images_N3HW: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit numbers, as a picture file has them; undoes ``as_floats``."""
    return (images_N3HW * 255).round().byte()


def _scores(
    term: Term,
    images_N3HW: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, object]],
    groups: Sequence[int] | None,
    on_call: Callable[[str, int], None],
) -> Tensor:
    scores_N = torch.full((len(prompts),), torch.nan)
    on_call(term.name, 0)
    for rows in _calls(term, len(prompts), groups):
        texts = [prompts[i] for i in rows]
        scores_N[rows] = _ask(term, images_N3HW[rows], texts, [metadata[i] for i in rows])
        on_call(term.name, len(rows))
    return scores_N


def _calls(term: Term, count: int, groups: Sequence[int] | None) -> list[list[int]]:
    """The images of each call."""
    size = term.scorer.batch_size
    if not is_group_wise(term.scorer):
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    if groups is None:
        raise RewardFailed(f"reward {term.name} compares the images of a group; none is named")
    by_group: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        by_group.setdefault(group, []).append(index)
    largest = max(map(len, by_group.values()), default=0)
    if largest > size:
        raise RewardFailed(
            f"reward {term.name} takes groups of at most {size} images, this one has {largest}; "
            "lower algorithm.branchesPerSeed or evaluation.imagesPerPrompt"
        )
    return list(by_group.values())


def _ask(
    term: Term,
    images_N3HW: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, object]],
) -> Tensor:
    """One call, checked: [N] float32, NaN where the score is missing."""
    try:
        answer = term.scorer.score(images_N3HW, prompts, metadata)
    except torch.OutOfMemoryError:  # the run's own, and no score to be missing: another exit code
        raise
    except Exception as error:  # whatever a scorer raises, it has no scores
        reason = _reason(error)
        if term.required:
            raise RewardFailed(f"reward {term.name}: {reason}") from error
        log.warning("reward %s: no score for %d images: %s", term.name, len(prompts), reason)
        return torch.full((len(prompts),), torch.nan)
    answer = answer if isinstance(answer, Scores) else Scores(answer, {})
    values_N = answer.values_N.detach().float().cpu()
    if values_N.shape != (len(prompts),):
        raise RewardFailed(
            f"reward {term.name} gave scores of shape {list(values_N.shape)}, expected one score "
            f"for each of {len(prompts)} images"
        )
    failed = dict(answer.failed)
    for index in (~values_N.isfinite()).nonzero().flatten().tolist():
        if index not in failed:
            failed[index] = _not_finite(term, float(values_N[index]), prompts[index])
    if not failed:
        return values_N
    if not failed.keys() <= set(range(len(prompts))):
        raise RewardFailed(
            f"reward {term.name} names images {sorted(failed)} as failed, of {len(prompts)}"
        )
    first = next(iter(failed.values()))
    log.warning("reward %s: no score for %d images: %s", term.name, len(failed), first)
    rows = torch.tensor(list(failed))
    return values_N.index_fill(0, rows, torch.nan)


def _not_finite(term: Term, value: float, prompt: str) -> str:
    message = f"gave {value} for an image of prompt {prompt!r}; a score must be finite"
    if term.required:
        raise RewardFailed(f"reward {term.name} {message}")
    return message


def _reason(error: Exception) -> str:
    expected = isinstance(error, TempFlowError | ValueError | RuntimeError | OSError)
    if not expected:
        log.error("a scorer failed", exc_info=error)
    text = str(error) or type(error).__name__
    return text if expected else f"{type(error).__name__}: {text}"
