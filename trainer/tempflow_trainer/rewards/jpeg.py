"""How well a picture can be compressed: the reward that needs no model (Black et al., DDPO,
arXiv 2305.13301)."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow_trainer.rewards.clip import pictures

QUALITY = 95


def kilobytes(images_N3HW: Tensor) -> Tensor:
    """Size of each image as a JPEG of quality 95, in thousands of bytes, [N]."""
    sizes = []
    for picture in pictures(images_N3HW):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


@dataclass(frozen=True)
class JpegCompressibility:
    """-kB / 500: below 0, and nearer to it the plainer the picture."""

    batch_size: int = 64

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        return -kilobytes(images_N3HW) / 500


@dataclass(frozen=True)
class JpegIncompressibility:
    """kB: the more detail, the higher."""

    batch_size: int = 64

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        return kilobytes(images_N3HW)
