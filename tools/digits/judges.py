"""The two readers of digits: the rewarded classifier and the independent judge.

They differ in kind (a convolutional network, a kernel machine) and see different digits. Both are
trained on distorted copies: reinforcement learning makes strokes bolder and leaves noise, and a
judge that only knows the data's pen would call such digits wrong.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tempflow_trainer.rewards.digits import (
    LANDMARK_LEVELS,
    DigitClassifier,
    RbfJudge,
    judge_features,
)
from tools.digits.data import Digits, halve

log = logging.getLogger(__name__)


def distort(images_N28: Tensor, generator: torch.Generator) -> Tensor:
    """Random copies as a writer and a generator might make them: [N, 28, 28] to [N, 14, 14].

    Turned by up to 12 degrees, sheared, scaled by 0.9 to 1.1, moved by up to 2 of 28 pixels; half
    of them with a pen up to one pixel wider; ink curve x^0.6 to x^1.6; noise of std 0 to 0.1.
    """
    count = len(images_N28)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle_N, shear_N = uniform(-0.21, 0.21), uniform(-0.2, 0.2)
    rows = [
        torch.stack(
            [angle_N.cos() * uniform(0.9, 1.1), -angle_N.sin() + shear_N, uniform(-1, 1) / 7], dim=1
        ),
        torch.stack([angle_N.sin(), angle_N.cos() * uniform(0.9, 1.1), uniform(-1, 1) / 7], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 1, 28, 28], align_corners=False)
    moved = F.grid_sample(images_N28[:, None], grid, align_corners=False)
    wider = F.max_pool2d(moved, 3, stride=1, padding=1)
    moved = moved.lerp(wider, uniform(-1, 1).clamp(min=0)[:, None, None, None])
    grey_N14 = halve(moved[:, 0]).clamp(0, 1)
    grey_N14 = grey_N14 ** torch.exp2(uniform(-0.7, 0.7))[:, None, None]
    noise_N14 = torch.randn(grey_N14.shape, generator=generator)
    return (grey_N14 + uniform(0, 0.1)[:, None, None] * noise_N14).clamp(0, 1)


def train_classifier(digits: Digits, *, steps: int, seed: int) -> DigitClassifier:
    """Cross-entropy with a little label smoothing, so that log p stays informative."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # initial weights and dropout draw from the global generator
    model = DigitClassifier().train()
    peak = 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 + math.cos(math.pi * step / steps)) / 2
        chosen_B = torch.randint(len(digits.labels_N), (128,), generator=generator)
        grey_B14 = distort(digits.images_N28[chosen_B], generator)
        loss = F.cross_entropy(model(grey_B14), digits.labels_N[chosen_B], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 500 == 0:
            log.info("classifier step %d loss %.3f", step + 1, loss.item())
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class JudgeRecipe:
    """Chosen on 1,500 digits of the base model's split, never on the test split."""

    seed: int
    landmarks: int = 2000
    copies: int = 16
    gamma: float = 1.5
    ridge: float = 1e-6


def fit_judge(digits: Digits, recipe: JudgeRecipe) -> RbfJudge:
    """Kernel ridge regression on one-hot labels over a subset of regressors: solve
    (K'K + ridge N L) w = K'y, with K the kernel to the landmarks and L the one among them.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    picked = torch.randperm(len(digits.labels_N), generator=generator)[: recipe.landmarks]
    features_MF = judge_features(halve(digits.images_N28[picked]))
    # Rounded as stored, so that the weights are fitted to what is shipped.
    landmarks_MF = (features_MF * LANDMARK_LEVELS).round() / LANDMARK_LEVELS
    count = len(landmarks_MF)
    empty = RbfJudge(landmarks_MF, torch.zeros(count, 10), torch.zeros(10), recipe.gamma)
    one_hot_N10 = F.one_hot(digits.labels_N, 10).double()
    bias_10 = one_hot_N10.mean(dim=0)
    gram_MM = torch.zeros(count, count, dtype=torch.float64)
    target_M10 = torch.zeros(count, 10, dtype=torch.float64)
    for copy in range(recipe.copies):
        clean = copy == 0
        grey = halve(digits.images_N28) if clean else distort(digits.images_N28, generator)
        kernel_NM = empty.kernel(grey).double()
        gram_MM += kernel_NM.T @ kernel_NM
        target_M10 += kernel_NM.T @ (one_hot_N10 - bias_10)
    log.info("judge: %d copies of %d digits", recipe.copies, len(digits.labels_N))
    among_MM = (-recipe.gamma * torch.cdist(landmarks_MF, landmarks_MF).double().square()).exp()
    penalty_MM = recipe.ridge * recipe.copies * len(digits.labels_N) * among_MM
    jitter_MM = 1e-6 * torch.eye(count, dtype=torch.float64)
    weights_M10 = torch.linalg.solve(gram_MM + penalty_MM + jitter_MM, target_M10)
    return RbfJudge(landmarks_MF, weights_M10.float(), bias_10.float(), recipe.gamma)
