"""Whether the pictures that ``tempflow sample`` drew show what they were asked for."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tempflow_trainer.evaluation import LABEL_PIXELS
from tempflow_trainer.rewards.digits import PICTURE_SIZE, DigitJudge


def share_found(row: Path, prompt: str, count: int) -> float:
    """The share of a row of ``count`` pictures in which the judge, which no training is rewarded
    by, finds the digit of the prompt: 0.1 by chance."""
    grid = Image.open(row).convert("RGB")
    width = (grid.width - LABEL_PIXELS) // count
    pictures = []
    for column in range(count):
        left = LABEL_PIXELS + column * width
        cell = grid.crop((left, 0, left + width - 2, grid.height - 2))  # without the white frame
        small = cell.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.NEAREST)
        pictures.append(torch.from_numpy(np.asarray(small) / np.float32(255)))
    images_N3HW = torch.stack(pictures).permute(0, 3, 1, 2)
    found_N = DigitJudge().score(images_N3HW, [prompt] * count, [{}] * count)
    return float(found_N.mean())
