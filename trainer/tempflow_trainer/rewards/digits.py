"""Rewards for the shipped digits model, the independent judge, and the diversity of pictures.

Every scorer takes images_N3HW, float [N, 3, H, W] in [0, 1] with 1 for ink, N prompts and N
mappings of metadata (unused here), and returns float32 [N] on the CPU, higher is better.
`batch_size` is how many images a caller should pass at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PICTURE_SIZE = 14

# The classifier's own log p on wrong digits is mostly -5 to -12, and its tail says nothing about
# how wrong they are; unbounded, a few such pictures would set a group's standard deviation.
LOG_PROBABILITY_FLOOR = -10.0

# MNIST scales every digit into a 20x20 box in a 28x28 picture.
DIGIT_BOX_SHARE = (20 / 28) ** 2


# Features are at most 1 and landmarks need no more precision than this (they are fitted to).
LANDMARK_LEVELS = 255
JUDGE_DIRECTIONS = 8


def digit_of(prompt: str) -> int:
    """The digit that a prompt asks for, by name or by numeral: "a three" and "the digit 3" are 3.

    Raises ValueError unless exactly one word is a digit.
    """
    names = {name: digit for digit, name in enumerate(DIGIT_NAMES)}
    numerals = {str(digit): digit for digit in range(10)}
    known = names | numerals
    found = [known[word] for word in prompt.lower().split() if word in known]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} digits in prompt {prompt!r}, expected exactly one of: " + " ".join(known)
        )
    return found[0]


class DigitClassifier(nn.Module):
    """The rewarded classifier: three small convolutions, grey [N, 14, 14] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.deep = nn.Conv2d(32, 32, 3, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(32 * (PICTURE_SIZE // 2) ** 2, 10)

    def forward(self, grey_NHW: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(grey_NHW[:, None]))
        hidden = torch.relu(self.down(hidden))
        hidden = torch.relu(self.deep(hidden))
        logits_N10: Tensor = self.head(self.dropout(hidden.flatten(1)))
        return logits_N10


@dataclass(frozen=True)
class RbfJudge:
    """A kernel machine, so that it shares no weakness with the rewarded network.

    landmarks_MF: `judge_features` of M training digits; weights_M10 and bias_10: one linear score
    per digit over the kernel exp(-gamma |feature - landmark|^2).
    """

    landmarks_MF: Tensor
    weights_M10: Tensor
    bias_10: Tensor
    gamma: float

    def kernel(self, grey_NHW: Tensor) -> Tensor:
        """Similarity to each landmark, [N, M] in (0, 1]."""
        features_NF = judge_features(grey_NHW)
        # Squares are expanded by hand: `cdist` builds no matrix product for few rows, and a
        # picture's score must not depend on how many others are scored with it.
        distance_NM = (
            features_NF.square().sum(1, keepdim=True)
            - 2 * features_NF @ self.landmarks_MF.T
            + self.landmarks_MF.square().sum(1)
        )
        return torch.exp(-self.gamma * distance_NM.clamp(min=0))

    def find(self, grey_NHW: Tensor) -> Tensor:
        """The digit in each picture, int64 [N]."""
        return (self.kernel(grey_NHW) @ self.weights_M10 + self.bias_10).argmax(dim=1)


def judge_features(grey_NHW: Tensor) -> Tensor:
    """Edges by direction and place, [N, 200]: central differences, split into 8 directions,
    averaged over 4x4 pixels every 3 pixels, scaled to length 1 so that the ink's strength does
    not matter (a small relative of the HOG descriptor: Dalal and Triggs, 2005).
    """
    padded_N1HW = F.pad(grey_NHW[:, None], (1, 1, 1, 1))
    across_N1HW = padded_N1HW[:, :, 1:-1, 2:] - padded_N1HW[:, :, 1:-1, :-2]
    down_N1HW = padded_N1HW[:, :, 2:, 1:-1] - padded_N1HW[:, :, :-2, 1:-1]
    angles = [2 * math.pi * part / JUDGE_DIRECTIONS for part in range(JUDGE_DIRECTIONS)]
    edges_N8HW = torch.cat(
        [across_N1HW * math.cos(angle) + down_N1HW * math.sin(angle) for angle in angles], dim=1
    ).relu()
    pooled_NF: Tensor = F.avg_pool2d(edges_N8HW, kernel_size=4, stride=3, padding=1).flatten(1)
    length_N1: Tensor = pooled_NF.norm(dim=1, keepdim=True)
    return pooled_NF / length_N1.clamp(min=1e-6)


@cache
def load_classifier() -> DigitClassifier:
    """The shipped rewarded classifier, frozen."""
    classifier = DigitClassifier()
    classifier.load_state_dict(_read_asset("classifier.safetensors"))
    return classifier.eval().requires_grad_(False)


@cache
def load_judge() -> RbfJudge:
    """The shipped judge. It is never a reward: it shows whether the reward is still earned."""
    tensors = _read_asset("judge.safetensors")
    return RbfJudge(
        landmarks_MF=tensors["landmarks"].float() / LANDMARK_LEVELS,
        weights_M10=tensors["weights"],
        bias_10=tensors["bias"],
        gamma=float(tensors["gamma"]),
    )


def _read_asset(name: str) -> dict[str, Tensor]:
    asset = files("tempflow_trainer") / "assets" / "digits" / name
    return safetensors.torch.load(asset.read_bytes())


@dataclass(frozen=True)
class DigitLogProbability:
    """Log-probability of the prompted digit by the classifier, in [LOG_PROBABILITY_FLOOR, 0]."""

    batch_size: int = 256

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        return _log_probability(images_N3HW, prompts).clamp(min=LOG_PROBABILITY_FLOOR)


@dataclass(frozen=True)
class DigitProbability:
    """Probability of the prompted digit by the classifier, in [0, 1]."""

    batch_size: int = 256

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        return _log_probability(images_N3HW, prompts).exp()


@dataclass(frozen=True)
class Ink:
    """Minus the distance between a picture's ink and `target`, at most 0.

    The unit: all ink of the picture over the area of the box in which digits are drawn (10 of 14
    pixels each way), so 1 is a full box. The data's mean is 0.26; 0.45 means bold strokes.
    """

    target: float = 0.45
    batch_size: int = 256

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        ink_N = _grey(images_N3HW).mean(dim=(1, 2)) / DIGIT_BOX_SHARE
        return -(ink_N - self.target).abs()


@dataclass(frozen=True)
class StrokeContrast:
    """How dark the ink is where there is ink: sum(x^2) / sum(x) over the pixels x, in [0, 1].

    1 for strokes of full ink on clean paper, g for an even grey g, 0 for an empty picture.
    """

    batch_size: int = 256

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        grey_NHW = _grey(images_N3HW)
        return _share(grey_NHW.square().sum(dim=(1, 2)), of=grey_NHW.sum(dim=(1, 2)))


@dataclass(frozen=True)
class Symmetry:
    """How much ink stays in place when left and right are swapped: sum(min(x, mirrored x)) over
    sum(x), in [0, 1].

    1 for a mirror-symmetric picture, 0 where no ink meets ink and for an empty picture.
    """

    batch_size: int = 256

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        grey_NHW = _grey(images_N3HW)
        kept_NHW = torch.minimum(grey_NHW, grey_NHW.flip(2))
        return _share(kept_NHW.sum(dim=(1, 2)), of=grey_NHW.sum(dim=(1, 2)))


@dataclass(frozen=True)
class DigitJudge:
    """1 where the judge finds the prompted digit, else 0. Held out: report it, do not reward it."""

    batch_size: int = 256

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        asked_N = _asked(images_N3HW, prompts)
        return (load_judge().find(_picture(images_N3HW)) == asked_N).float()


def diversity_within_digit(images_N3HW: Tensor, digits: Sequence[int]) -> float:
    """How different the pictures of one digit are, in [0, 1]; 0 if all are equal.

    The root mean square difference of the pixels of two pictures, averaged over the pairs within
    a digit, then over the digits that have a pair. `digits`: what each picture was asked to show.
    """
    grey_NF = _grey(images_N3HW).flatten(1)
    if len(digits) != len(grey_NF):
        raise ValueError(f"{len(digits)} digits for {len(grey_NF)} images, expected one each")
    digit_N = torch.tensor(list(digits))
    means = []
    for digit in sorted(set(digits)):
        same_KF = grey_NF[digit_N == digit]
        if len(same_KF) > 1:
            means.append(float(torch.pdist(same_KF).mean()) / math.sqrt(same_KF.shape[1]))
    if not means:
        raise ValueError(f"no digit has two images among {sorted(set(digits))}, expected one pair")
    return sum(means) / len(means)


def _log_probability(images_N3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    asked_N = _asked(images_N3HW, prompts)
    with torch.no_grad():
        log_p_N10: Tensor = load_classifier()(_picture(images_N3HW)).log_softmax(dim=1)
    return log_p_N10.gather(1, asked_N[:, None])[:, 0]


def _asked(images_N3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """The prompted digits, int64 [N]."""
    if len(prompts) != len(images_N3HW):
        raise ValueError(f"{len(prompts)} prompts for {len(images_N3HW)} images, expected one each")
    return torch.tensor([digit_of(prompt) for prompt in prompts], dtype=torch.int64)


def _grey(images_N3HW: Tensor) -> Tensor:
    """Mean of the channels, float32 [N, H, W] on the CPU."""
    if images_N3HW.ndim != 4 or images_N3HW.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images_N3HW.shape)}, expected [N, 3, H, W]")
    return images_N3HW.detach().to("cpu", torch.float32).mean(dim=1)


def _picture(images_N3HW: Tensor) -> Tensor:
    """`_grey` for the two readers of digits, which know one size."""
    grey_NHW = _grey(images_N3HW)
    if grey_NHW.shape[1:] != (PICTURE_SIZE, PICTURE_SIZE):
        raise ValueError(
            f"pictures of {tuple(grey_NHW.shape[1:])} pixels, "
            f"expected {(PICTURE_SIZE, PICTURE_SIZE)}"
        )
    return grey_NHW


def _share(part_N: Tensor, *, of: Tensor) -> Tensor:
    """part / of, and 0 where `of` is 0: an empty picture earns nothing."""
    return torch.where(of > 0, part_N / of.clamp(min=torch.finfo(of.dtype).tiny), 0.0)
