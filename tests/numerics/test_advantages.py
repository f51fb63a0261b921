"""From rewards to advantages: oracles, and what must not change them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempflow_trainer.algorithm.advantages import (
    AdvantageRule,
    advantages_GSK,
    zero_spread_share,
)
from tests.numerics.schedules import law

PAPER = AdvantageRule(scope="seed", deviation="group", epsilon=1e-4, clip_max=5.0)
BY_PROMPT = replace(PAPER, scope="prompt")
rules = st.builds(
    AdvantageRule,
    scope=st.sampled_from(["seed", "prompt"]),
    deviation=st.sampled_from(["group", "global", "none"]),
    epsilon=st.sampled_from([1e-4, 1e-2]),
    clip_max=st.just(1000.0),
)


@st.composite
def rewards_and_ids(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rewards of [G, S, K], and which prompt each group is of, in any order."""
    groups, steps = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    draws = draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    ids = draw(st.lists(st.integers(0, 3), min_size=groups, max_size=groups))
    return torch.randn(groups, steps, draws, generator=generator), torch.tensor(ids)


def test_six_rewards_in_a_row() -> None:
    rewards = torch.arange(1.0, 7).view(1, 1, 6)
    found = advantages_GSK(rewards, torch.tensor([0]), PAPER).flatten().tolist()
    half = [0.29275, 0.87826, 1.46376]
    assert found == pytest.approx([-value for value in reversed(half)] + half, abs=1e-5)


@law
@given(
    value=st.floats(-1e4, 1e4),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(2, 24)),
    rule=rules,
)
def test_equal_rewards_teach_exactly_nothing(
    value: float, shape: tuple[int, int, int], rule: AdvantageRule
) -> None:
    rewards, ids = torch.full(shape, value), torch.zeros(shape[0], dtype=torch.long)
    assert (advantages_GSK(rewards, ids, rule) == 0).all()
    assert zero_spread_share(rewards, ids, rule.scope) == 1.0


@law
@given(case=rewards_and_ids(), rule=rules)
def test_advantages_of_a_group_sum_to_zero_at_every_step(
    case: tuple[Tensor, Tensor], rule: AdvantageRule
) -> None:
    rewards, ids = case
    found = advantages_GSK(rewards, ids, rule)
    assert found.dtype == torch.float32
    keys = torch.arange(len(ids)) if rule.scope == "seed" else ids
    for key in keys.unique():
        assert found[keys == key].sum(dim=(0, 2)).abs().max() < 1e-3


@law
@given(case=rewards_and_ids(), rule=rules, shift=st.floats(-50, 50))
def test_a_shift_of_all_rewards_changes_nothing(
    case: tuple[Tensor, Tensor], rule: AdvantageRule, shift: float
) -> None:
    rewards, ids = case
    shifted = advantages_GSK(rewards.double() + shift, ids, rule)
    torch.testing.assert_close(shifted, advantages_GSK(rewards, ids, rule), rtol=1e-4, atol=1e-5)


@law
@given(case=rewards_and_ids(), scale=st.floats(0.5, 100))
def test_a_scale_of_all_rewards_changes_nothing_but_the_part_of_epsilon(
    case: tuple[Tensor, Tensor], scale: float
) -> None:
    rewards, ids = case
    rule = replace(PAPER, epsilon=1e-12)
    scaled = advantages_GSK(rewards * scale, ids, rule)
    torch.testing.assert_close(scaled, advantages_GSK(rewards, ids, rule), rtol=1e-3, atol=1e-4)


@law
@given(case=rewards_and_ids())
def test_seed_and_prompt_groups_are_the_same_with_one_seed_a_prompt(
    case: tuple[Tensor, Tensor],
) -> None:
    rewards, _ = case
    ids = torch.arange(len(rewards)).flip(0)
    torch.testing.assert_close(
        advantages_GSK(rewards, ids, PAPER), advantages_GSK(rewards, ids, BY_PROMPT)
    )


@law
@given(case=rewards_and_ids(), rule=rules, seed=st.integers(0, 2**32 - 1))
def test_groups_follow_their_ids_wherever_they_stand(
    case: tuple[Tensor, Tensor], rule: AdvantageRule, seed: int
) -> None:
    rewards, ids = case
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    moved = advantages_GSK(rewards[order], ids[order], rule)
    torch.testing.assert_close(moved, advantages_GSK(rewards, ids, rule)[order])


@law
@given(case=rewards_and_ids(), rule=rules)
def test_steps_are_never_compared_with_one_another(
    case: tuple[Tensor, Tensor], rule: AdvantageRule
) -> None:
    rewards, ids = case
    alone = advantages_GSK(rewards[:, :1], ids, rule)
    torch.testing.assert_close(advantages_GSK(rewards, ids, rule)[:, :1], alone)


@law
@given(case=rewards_and_ids())
def test_each_rule_against_its_plain_formula(case: tuple[Tensor, Tensor]) -> None:
    rewards, ids = case
    for g, key in enumerate(ids.tolist()):
        for s in range(rewards.shape[1]):
            for scope, members in (
                ("seed", rewards[g, s]),
                ("prompt", rewards[ids == key][:, s].flatten()),
            ):
                centred = rewards[g, s] - members.mean()
                for deviation, divisor in (
                    ("group", members.std(correction=0) + 1e-2),
                    ("global", rewards[:, s].std(correction=0) + 1e-2),
                    ("none", torch.tensor(1.0)),
                ):
                    rule = AdvantageRule(scope, deviation, 1e-2, 1000.0)
                    found = advantages_GSK(rewards, ids, rule)[g, s]
                    torch.testing.assert_close(found, centred / divisor, rtol=1e-4, atol=1e-5)


def test_advantages_are_cut_on_both_sides() -> None:
    rewards = torch.tensor([[[0.0] * 99 + [1.0]]])
    rule = replace(PAPER, clip_max=0.05)
    found = advantages_GSK(rewards, torch.tensor([0]), rule)
    assert float(found.max()) == pytest.approx(0.05)
    assert float(found.min()) == pytest.approx(-0.05)


def test_the_share_without_spread_counts_groups_and_steps() -> None:
    rewards = torch.tensor([[[1.0, 1.0], [1.0, 2.0]], [[3.0, 3.0], [4.0, 4.0]]])
    ids = torch.tensor([7, 7])
    assert zero_spread_share(rewards, ids, "seed") == 0.75
    assert zero_spread_share(rewards, ids, "prompt") == 0.0
