"""The recipe of the shipped model runs: a few steps on random pictures, which teach nothing."""

import torch

from tools.digits.base import BaseRecipe, make_pipeline, train_base
from tools.digits.data import Digits
from tools.digits.evaluate import validation_loss
from tools.digits.judges import train_classifier

DIGITS = Digits(
    torch.rand(32, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10
)


def test_the_base_model_learns_from_its_first_steps() -> None:
    pipeline = make_pipeline(0)
    before = validation_loss(pipeline, DIGITS)
    train_base(pipeline, DIGITS, BaseRecipe(steps=10, seed=0, batch_size=8, warmup_steps=2))
    assert validation_loss(pipeline, DIGITS) < before
    assert not pipeline.transformer.training


def test_the_classifier_learns_from_its_first_steps() -> None:
    def loss(steps: int) -> float:
        model = train_classifier(DIGITS, steps=steps, seed=0)
        assert not model.training
        small = DIGITS.images_N28.reshape(32, 14, 2, 14, 2).mean(dim=(2, 4))
        return float(torch.nn.functional.cross_entropy(model(small), DIGITS.labels_N))

    assert loss(3) < loss(0)
