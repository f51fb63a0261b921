"""Random numbers named by what they are for."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempflow_trainer import seeds

law = settings(max_examples=25, deadline=None, derandomize=True)
names = st.lists(st.one_of(st.integers(0, 99), st.sampled_from(["start", "branch"])), max_size=5)


@law
@given(run_seed=st.integers(0, 2**53 - 1), first=names, second=names)
def test_a_draw_does_not_depend_on_what_was_drawn_before(
    run_seed: int, first: list[int | str], second: list[int | str]
) -> None:
    alone = seeds.normal((3,), run_seed, *second)
    seeds.normal((7,), run_seed, *first)
    torch.rand(5)
    assert torch.equal(seeds.normal((3,), run_seed, *second), alone)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    before = seeds.normal((3,), 0, "x")
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(2)
    assert torch.equal(seeds.normal((3,), 0, "x"), before)


def test_every_draw_of_a_run_has_a_seed_of_its_own() -> None:
    names = [
        (epoch, position, seed, *purpose)
        for epoch, position, seed in itertools.product(range(6), range(4), range(3))
        for purpose in [
            ("start",),
            *(("branch", step, draw) for step in range(9) for draw in range(4)),
        ]
    ]
    names += [("evaluation", prompt, image) for prompt in range(20) for image in range(8)]
    names += [("prompts", passed) for passed in range(20)]
    found = {seeds.derive(0, *name) for name in names} | {seeds.derive(1, *name) for name in names}
    assert len(found) == 2 * len(names)


def test_distinct_draws_are_uncorrelated() -> None:
    draws = torch.stack([seeds.normal((2000,), 0, 0, 0, "branch", k) for k in range(6)])
    correlation = torch.corrcoef(draws) - torch.eye(6)
    assert correlation.abs().max() < 0.1
    assert draws.mean().abs() < 0.05
    assert float(draws.std()) == pytest.approx(1, abs=0.05)


@law
@given(length=st.integers(1, 50), run_seed=st.integers(0, 2**53 - 1))
def test_a_permutation_has_every_number_once(length: int, run_seed: int) -> None:
    assert sorted(seeds.permutation(length, run_seed, "prompts")) == list(range(length))


def test_numbers_are_the_same_in_every_version() -> None:
    """A stored run continues with the noise that it began with."""
    assert seeds.derive(0, 0, 1, 2, "branch", 3, 4) == DERIVED
    torch.testing.assert_close(seeds.normal((3,), 7, "start"), torch.tensor(NORMAL))


DERIVED = 2257432707351674341
NORMAL = [-2.43421459, 0.44568768, -1.53430033]
