"""The average of the weights."""

import pytest
import torch
from torch import nn

from tempflow_trainer.ema import Ema


def parameters(value: float) -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.full((3,), value))}


def test_it_starts_at_the_weights_and_is_no_view_of_them() -> None:
    trained = parameters(2.0)
    ema = Ema(trained, decay=0.9, every_updates=1)
    with torch.no_grad():
        trained["w"].fill_(5.0)
    assert ema.values["w"].tolist() == [2.0] * 3


def test_it_follows_the_published_warm_up_to_its_bound() -> None:
    ema = Ema(parameters(0.0), decay=0.5, every_updates=1)
    expected = 0.0
    for done in range(1, 40):
        ema.update(parameters(float(done)), done)
        decay = min(0.5, (1 + done) / (10 + done))
        expected = decay * expected + (1 - decay) * done
        assert ema.values["w"].tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_it_moves_only_every_so_many_updates() -> None:
    ema = Ema(parameters(0.0), decay=0.9, every_updates=4)
    moved = []
    for done in range(1, 13):
        before = ema.values["w"].clone()
        ema.update(parameters(1.0), done)
        if not torch.equal(before, ema.values["w"]):
            moved.append(done)
    assert moved == [4, 8, 12]


def test_without_decay_it_is_the_weights() -> None:
    ema = Ema(parameters(0.0), decay=0.0, every_updates=1)
    ema.update(parameters(0.3), 1)
    assert torch.equal(ema.values["w"], torch.full((3,), 0.3))
