"""JPEG sizes as a reward."""

import io

import torch
from PIL import Image

from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import registry


def test_plain_pictures_are_small_and_the_scales_are_the_published_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.full((3, 48, 64), 0.5), torch.rand(3, 48, 64, generator=generator)])
    terms = [RewardTerm(name="jpeg-compressibility"), RewardTerm(name="jpeg-incompressibility")]
    scores = registry.build(terms).score(images, ["a", "b"], [{}, {}])
    sizes = []
    for image in (images * 255).round().to(torch.uint8):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()))
    plain, noisy = sizes
    assert noisy > 5 * plain
    expected = torch.tensor([plain / 1000, noisy / 1000])
    torch.testing.assert_close(scores["jpeg-incompressibility"], expected)
    torch.testing.assert_close(scores["jpeg-compressibility"], -expected / 500)
