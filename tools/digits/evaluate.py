"""Measures a folder of digits assets. The bounds it should keep are in README.md beside this file.

    PYTHONPATH=sdk:trainer:. python -m tools.digits.evaluate [--assets FOLDER] [--grid FILE.png]

The pictures are read by the classifier and the judge that ship with the package.
"""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tempflow_trainer.models.families.digits import DigitsPipeline
from tempflow_trainer.rewards.digits import (
    DIGIT_BOX_SHARE,
    DIGIT_NAMES,
    DigitJudge,
    DigitProbability,
    diversity_within_digit,
    load_classifier,
    load_judge,
)
from tools.digits.base import as_latents, velocity_loss
from tools.digits.data import DEFAULT_CACHE, Digits, halve, load_splits

# What README.md beside this file promises, and the tests hold what ships to.
JUDGED_ACCURACY = (0.50, 0.75)
MOST_LOSS = 0.27
PER_DIGIT = 100
SAMPLING_STEPS = 10
VALIDATION_ROUNDS = 8
GRID_COLUMNS = 12
GRID_ZOOM = 5


@torch.no_grad()
def draw(pipeline: DigitsPipeline, prompts: list[str], seed: int) -> Tensor:
    """Images [N, 3, 14, 14]: Euler steps from fresh noise, no guidance."""
    states_NLD, pooled_NP = pipeline.encode(prompts)
    generator = torch.Generator().manual_seed(seed)
    size = pipeline.transformer.config.sample_size
    latents_N1HW = torch.randn(len(prompts), 1, size, size, generator=generator)
    pipeline.scheduler.set_timesteps(SAMPLING_STEPS)
    for timestep in pipeline.scheduler.timesteps:
        velocity_N1HW = pipeline.transformer(
            hidden_states=latents_N1HW,
            timestep=timestep.expand(len(prompts)),
            encoder_hidden_states=states_NLD,
            pooled_projections=pooled_NP,
            return_dict=False,
        )[0]
        latents_N1HW = pipeline.scheduler.step(
            velocity_N1HW, timestep, latents_N1HW, return_dict=False
        )[0]
    return pipeline.decode(latents_N1HW)


@torch.no_grad()
def validation_loss(pipeline: DigitsPipeline, digits: Digits) -> float:
    """Mean `velocity_loss` on digits with their right prompts, the same noise in every call.

    Each digit meets VALIDATION_ROUNDS noise levels, spread evenly over the logit-normal density.
    """
    generator = torch.Generator().manual_seed(0)
    clean_N1HW = as_latents(digits)
    states_NLD, pooled_NP = pipeline.encode(
        [f"a {DIGIT_NAMES[label]}" for label in digits.labels_N.tolist()]
    )
    losses = []
    for level in range(VALIDATION_ROUNDS):
        quantile_N = (level + torch.rand(len(clean_N1HW), generator=generator)) / VALIDATION_ROUNDS
        sigma_N = torch.special.ndtri(quantile_N.clamp(1e-4, 1 - 1e-4)).sigmoid()
        noise_N1HW = torch.randn(clean_N1HW.shape, generator=generator)
        losses.append(
            velocity_loss(
                pipeline.transformer, clean_N1HW, noise_N1HW, sigma_N, states_NLD, pooled_NP
            ).mean()
        )
    return float(torch.stack(losses).mean())


def save_grid(images_N3HW: Tensor, file: Path) -> None:
    """One row per digit, GRID_COLUMNS pictures each, dark ink on white."""
    by_digit = images_N3HW[:, 0].reshape(10, PER_DIGIT, *images_N3HW.shape[2:])[:, :GRID_COLUMNS]
    paper = torch.zeros(10, GRID_COLUMNS, by_digit.shape[2] + 2, by_digit.shape[3] + 2)
    paper[:, :, 1:-1, 1:-1] = by_digit
    sheet = paper.permute(0, 2, 1, 3).reshape(10 * paper.shape[2], GRID_COLUMNS * paper.shape[3])
    picture = Image.fromarray(((1 - sheet) * 255).round().to(torch.uint8).numpy())
    picture.resize(
        (picture.width * GRID_ZOOM, picture.height * GRID_ZOOM), Image.Resampling.NEAREST
    ).save(file)


def report(pipeline: DigitsPipeline, test: Digits, seed: int, grid: Path | None) -> None:
    real_NHW = halve(test.images_N28)
    classified = load_classifier()(real_NHW).argmax(dim=1)
    judged = load_judge().find(real_NHW)
    print(f"classifier, test split: {(classified == test.labels_N).float().mean():.4f}")
    print(f"judge, test split:      {(judged == test.labels_N).float().mean():.4f}")
    print(f"validation loss:        {validation_loss(pipeline, test):.4f}, at most {MOST_LOSS}")
    labels = [digit for digit in range(10) for _ in range(PER_DIGIT)]
    prompts = [f"a {DIGIT_NAMES[digit]}" for digit in labels]
    images_N3HW = draw(pipeline, prompts, seed)
    right_N = DigitJudge().score(images_N3HW, prompts, [{}] * len(prompts))
    believed_N = DigitProbability().score(images_N3HW, prompts, [{}] * len(prompts))
    each = " ".join(f"{share:.2f}" for share in right_N.reshape(10, -1).mean(dim=1).tolist())
    seen = torch.bincount(load_judge().find(images_N3HW[:, 0]), minlength=10)
    real_N3HW = real_NHW[:, None].expand(-1, 3, -1, -1)
    low, high = JUDGED_ACCURACY
    print(f"judged accuracy:        {right_N.mean():.4f}, {low} to {high}; by digit {each}")
    print(f"digits the judge finds: {seen.tolist()}")
    print(f"mean probability:       {believed_N.mean():.4f}")
    print(
        f"ink, drawn and real:    {images_N3HW.mean() / DIGIT_BOX_SHARE:.4f} "
        f"{real_NHW.mean() / DIGIT_BOX_SHARE:.4f}"
    )
    print(
        f"diversity, and real:    {diversity_within_digit(images_N3HW, labels):.4f} "
        f"{diversity_within_digit(real_N3HW, test.labels_N.tolist()):.4f}"
    )
    if grid is not None:
        save_grid(images_N3HW, grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--assets", type=Path, help="folder; default: what ships")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="write the pictures to this PNG file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    test = load_splits(arguments.cache)["test"]
    with as_file(files("tempflow_trainer") / "assets" / "digits") as shipped:
        pipeline = DigitsPipeline.load(arguments.assets or shipped)
    report(pipeline, test, arguments.seed, arguments.grid)


if __name__ == "__main__":
    main()
