"""Several rewards, one advantage: against plain loops, by their laws, and with scores missing."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempflow_trainer.algorithm.advantages import AdvantageRule, advantages_GSK
from tempflow_trainer.algorithm.combination import Combined, Component, combine
from tests.numerics.schedules import law

RULE = AdvantageRule("seed", "group", 1e-4, 1000.0, "normalised")
rules = st.builds(
    AdvantageRule,
    scope=st.sampled_from(["seed", "prompt"]),
    deviation=st.sampled_from(["group", "global", "none"]),
    epsilon=st.just(1e-3),
    clip_max=st.just(1000.0),
    combination=st.sampled_from(["raw", "normalised"]),
)


@st.composite
def cases(draw: st.DrawFn, *, holes: bool) -> tuple[list[Component], Tensor]:
    groups, steps, draws = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    ids = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=groups, max_size=groups)))
    components = []
    for _ in range(draw(st.integers(1, 3))):
        scores = torch.randn(groups, steps, draws, generator=generator) * 3
        if holes:
            missing = torch.rand(scores.shape, generator=generator) < 0.15
            scores = scores.masked_fill(missing, torch.nan)
        weight = draw(st.sampled_from([-1.0, 0.5, 2.0]))
        components.append(Component(scores, weight, draw(st.booleans())))
    return components, ids


def by_hand(
    components: list[Component], ids: Tensor, rule: AdvantageRule
) -> list[tuple[bool, float, float]]:
    """Entry by entry, from the words of the documentation: [kept, reward, advantage]."""
    groups, steps, draws = components[0].scores_GSK.shape
    tables = [component.scores_GSK.double().tolist() for component in components]
    found = []

    def peers(g: int) -> list[int]:
        return [g] if rule.scope == "seed" else [h for h in range(groups) if ids[h] == ids[g]]

    def lacks(g: int, s: int) -> bool:
        return any(
            component.required and any(math.isnan(v) for h in peers(g) for v in table[h][s])
            for component, table in zip(components, tables, strict=True)
        )

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def there(table: list[list[list[float]]], rows: list[int], s: int) -> list[float]:
        return [v for h in rows for v in table[h][s] if not math.isnan(v)]

    def total(g: int, s: int, k: int) -> float:
        summed = 0.0
        for component, table in zip(components, tables, strict=True):
            value = table[g][s][k]
            if math.isnan(value):
                everything = [v for t in range(steps) for v in there(table, list(range(groups)), t)]
                near = there(table, peers(g), s) or everything or [0.0]
                value = mean(near)
            summed += component.weight * value
        return summed

    def advantage(value: float, group: list[float], step: list[float]) -> float:
        centre = mean(group)
        spread = {"group": group, "global": step, "none": [1.0]}[rule.deviation]
        std = math.sqrt(mean([(v - mean(spread)) ** 2 for v in spread]))
        return (value - centre) / (1 if rule.deviation == "none" else std + rule.epsilon)

    for g in range(groups):
        for s in range(steps):
            for k in range(draws):
                if lacks(g, s):
                    found.append((False, math.nan, 0.0))
                    continue
                kept = [h for h in range(groups) if not lacks(h, s)]
                if rule.combination == "raw":
                    group = [total(h, s, j) for h in peers(g) for j in range(draws)]
                    step = [total(h, s, j) for h in kept for j in range(draws)]
                    worth = advantage(total(g, s, k), group, step)
                else:
                    worth = 0.0
                    for component, table in zip(components, tables, strict=True):
                        if not math.isnan(table[g][s][k]):
                            group, step = there(table, peers(g), s), there(table, kept, s)
                            part = advantage(table[g][s][k], group, step)
                            worth += component.weight * part
                found.append((True, total(g, s, k), worth))
    return found


@law
@given(case=cases(holes=True), rule=rules)
def test_entry_by_entry(case: tuple[list[Component], Tensor], rule: AdvantageRule) -> None:
    components, ids = case
    expected = by_hand(components, ids, rule)
    found = combine(components, ids, rule)
    if found is None:
        assert not any(kept for kept, _, _ in expected)
        return
    kept = found.kept_GS[..., None].expand_as(found.rewards_GSK).flatten().tolist()
    assert kept == [row[0] for row in expected]
    rewards = torch.tensor([row[1] for row in expected]).float()
    torch.testing.assert_close(
        found.rewards_GSK.flatten(), rewards, rtol=1e-4, atol=1e-4, equal_nan=True
    )
    worth = torch.tensor([row[2] for row in expected]).float()
    torch.testing.assert_close(found.advantages_GSK.flatten(), worth, rtol=2e-3, atol=2e-3)


@law
@given(case=cases(holes=False), rule=rules)
def test_whole_raw_scores_give_what_their_sum_gives(
    case: tuple[list[Component], Tensor], rule: AdvantageRule
) -> None:
    components, ids = case
    raw = replace(rule, combination="raw")
    found = combined(components, ids, raw)
    weighted = torch.stack([c.weight * c.scores_GSK for c in components]).sum(dim=0)
    assert torch.equal(found.rewards_GSK, weighted)
    assert torch.equal(found.advantages_GSK, advantages_GSK(weighted, ids, raw))
    assert bool(found.kept_GS.all())


def combined(components: list[Component], ids: Tensor, rule: AdvantageRule) -> Combined:
    found = combine(components, ids, rule)
    assert found is not None
    return found


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_normalised_rewards_weigh_what_their_weights_say_whatever_their_scale(scale: float) -> None:
    """With raw sums the wide one decides; this is what users of two rewards stumble over."""
    generator = torch.Generator().manual_seed(0)
    narrow = torch.randn(4, 2, 6, generator=generator)
    wide = torch.randn(4, 2, 6, generator=generator)
    ids, rule = torch.arange(4), replace(RULE, epsilon=1e-9)

    def advantages(combination: str, scale: float) -> Tensor:
        parts = [Component(narrow, 1.0, True), Component(wide * scale, 1.0, True)]
        return combined(parts, ids, replace(rule, combination=combination)).advantages_GSK

    torch.testing.assert_close(
        advantages("normalised", scale), advantages("normalised", 1.0), rtol=1e-3, atol=1e-3
    )
    if scale != 1:
        assert (advantages("raw", scale) - advantages("raw", 1.0)).abs().max() > 0.3


def test_two_rewards_by_hand() -> None:
    """Deviations 1 and 10: (-1, 1) + 2 (1, -1) = (1, -1) normalised; (-1, 1) + (20, -20) raw."""
    parts = [
        Component(torch.tensor([[[0.0, 2.0]]]), 1.0, True),
        Component(torch.tensor([[[20.0, 0.0]]]), 2.0, True),
    ]
    normalised = combined(parts, torch.tensor([0]), replace(RULE, epsilon=1e-9))
    assert normalised.advantages_GSK.flatten().tolist() == pytest.approx([1.0, -1.0])
    assert normalised.rewards_GSK.flatten().tolist() == [40.0, 2.0]
    rule = replace(RULE, combination="raw", deviation="none")
    raw = combined(parts, torch.tensor([0]), rule)
    assert raw.advantages_GSK.flatten().tolist() == pytest.approx([19.0, -19.0])
    cut = combined(parts, torch.tensor([0]), replace(rule, clip_max=5.0))
    assert cut.advantages_GSK.flatten().tolist() == [5.0, -5.0]


def test_a_masked_score_has_no_part_in_its_draws_advantage() -> None:
    first = torch.tensor([[[0.0, 1.0, 2.0]]])
    second = torch.tensor([[[4.0, torch.nan, 8.0]]])
    parts = [Component(first, 1.0, True), Component(second, 1.0, False)]
    found = combined(parts, torch.tensor([0]), replace(RULE, deviation="none"))
    assert found.advantages_GSK.flatten().tolist() == [-3.0, 0.0, 3.0]
    assert found.rewards_GSK.flatten().tolist() == [4.0, 7.0, 10.0]


@pytest.mark.parametrize("combination", ["raw", "normalised"])
def test_pairs_without_spread_are_counted_among_those_that_are_kept(combination: str) -> None:
    flat, spread = [1.0, 1.0], [0.0, 1.0]
    first = torch.tensor([[flat], [flat], [spread], [[torch.nan, 1.0]]])
    second = torch.tensor([[flat], [spread], [flat], [spread]])
    parts = [Component(first, 1.0, True), Component(second, 1.0, True)]
    found = combined(parts, torch.arange(4), replace(RULE, combination=combination))
    assert found.zero_share == pytest.approx(1 / 3)
    assert found.kept_GS.flatten().tolist() == [True, True, True, False]
