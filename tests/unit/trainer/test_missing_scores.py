"""Epochs in which rewards fail with some images: what is learned, and what is counted."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempflow_api.errors import RewardFailed
from tempflow_trainer import loop
from tempflow_trainer.data import Group, PromptOrder
from tempflow_trainer.loop import Run
from tempflow_trainer.main import evaluator_of
from tempflow_trainer.rewards.base import Reward, Scorer, Scores, Term
from tests.numerics.toys import FLOW_GRPO, Brightness, prompts_of, run_of, spec_of

BY_PROMPT: dict[str, object] = {"algorithm.advantage": {"scope": "prompt"}}
GLOBAL: dict[str, object] = {"algorithm.advantage": {"deviation": "global"}}
TWO_UPDATES: dict[str, object] = {"algorithm.updatesPerEpoch": 2}


@dataclass(frozen=True)
class Failing:
    """Another reward that fails with some images, and lies about their score."""

    fails: Callable[[str, int], bool]
    """Of the prompt and the number of times that it was seen."""
    batch_size: int = 64
    seen: dict[str, int] = field(default_factory=dict)

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Scores:
        failed = {}
        for index, prompt in enumerate(prompts):
            if self.fails(prompt, self.seen.get(prompt, 0)):
                failed[index] = "unreadable"
            self.seen[prompt] = self.seen.get(prompt, 0) + 1
        values = images_N3HW.amax(dim=(1, 2, 3))
        return Scores(values.index_fill(0, torch.tensor(list(failed), dtype=torch.long), 0), failed)


@dataclass(frozen=True)
class Without(PromptOrder):
    """Groups are left out before anything is drawn."""

    gone: Callable[[Group], bool] = lambda _: False

    def shares(self, epoch: int, *, rank: int, world: int) -> list[list[Group]]:
        shares = super().shares(epoch, rank=rank, world=world)
        return [[group for group in share if not self.gone(group)] for share in shares]


def trained_weights(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in run.tuning.parameters().values()])


def rewarded(changes: Mapping[str, object], fails: Callable[[str, int], bool], **term: Any) -> Run:
    scorer: Scorer = Failing(fails)
    return replace(
        run_of(spec_of(changes)),
        reward=Reward([Term("light", 1.0, Brightness()), Term("peak", 0.5, scorer, **term)]),
    )


def without(run: Run, gone: Callable[[Group], bool]) -> Run:
    return replace(run, order=Without(**vars(run.order), gone=gone))


def images_of_a_prompt(run: Run) -> int:
    return run.order.seeds_per_prompt * run.exploration.plan(0).images_per_group


@pytest.mark.parametrize(
    "changes",
    [{}, BY_PROMPT, GLOBAL, TWO_UPDATES, FLOW_GRPO],
    ids=["seed", "prompt", "global deviation", "two updates", "flow-grpo"],
)
@pytest.mark.parametrize("combination", ["raw", "normalised"])
def test_an_update_without_a_group_equals_one_where_a_score_is_missing(
    changes: dict[str, object], combination: str
) -> None:
    run = rewarded(changes, lambda prompt, _: prompt == "a two")
    rule = replace(run.advantage_rule, combination=combination)
    run = replace(run, advantage_rule=rule)
    other = rewarded(changes, lambda *_: False)
    other = without(replace(other, advantage_rule=rule), lambda g: g.prompt.text == "a two")
    metrics, expected = loop.run_epoch(run, 0), loop.run_epoch(other, 0)
    torch.testing.assert_close(trained_weights(run), trained_weights(other), rtol=1e-5, atol=1e-7)
    for name in ("reward", "rewardStd", "loss", "gradNorm", "advantageZeroShare"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7)
    seeds, steps = run.order.seeds_per_prompt, len(run.exploration.plan(0).steps)
    assert metrics["groupsLeftOut"] == seeds * steps
    assert metrics["missingScores"] == {"light": 0, "peak": images_of_a_prompt(run)}
    assert expected["groupsLeftOut"] == 0


def test_one_missing_score_takes_the_draws_of_its_step_with_it_and_no_others() -> None:
    run = rewarded({}, lambda prompt, seen: (prompt, seen) == ("a two", 1))
    metrics = loop.run_epoch(run, 0)
    assert metrics["groupsLeftOut"] == 1
    assert metrics["missingScores"]["peak"] == 1
    by_prompt = rewarded(BY_PROMPT, lambda prompt, seen: (prompt, seen) == ("a two", 1))
    assert loop.run_epoch(by_prompt, 0)["groupsLeftOut"] == by_prompt.order.seeds_per_prompt


def test_ranks_make_as_many_calls_whatever_is_missing() -> None:
    """With sharded weights a rank that makes fewer would leave the others waiting for ever."""
    changes: dict[str, object] = {"compute.rowsPerTrainingCall": 4}
    some = rewarded(changes, lambda prompt, _: prompt != "a two")
    none = rewarded(changes, lambda *_: False)
    for run in (some, none):
        loop.run_epoch(run, 0)
    assert some.policy.evaluations == none.policy.evaluations


def test_a_missing_score_is_not_a_zero() -> None:
    failing = rewarded({}, lambda prompt, seen: prompt == "a two" and seen % 2 == 0)
    before = trained_weights(failing)
    loop.run_epoch(failing, 0)

    @dataclass(frozen=True)
    class Zero(Failing):
        def score(self, *arguments: Any) -> Scores:
            return Scores(super().score(*arguments).values_N, {})

    zero = rewarded({}, lambda *_: False)
    scorer = Zero(lambda prompt, seen: prompt == "a two" and seen % 2 == 0)
    zero = replace(zero, reward=Reward([zero.reward.terms[0], Term("peak", 0.5, scorer)]))
    loop.run_epoch(zero, 0)
    assert not torch.allclose(trained_weights(zero), trained_weights(failing), atol=1e-7)
    assert not torch.equal(before, trained_weights(failing))


@pytest.mark.parametrize("combination", ["raw", "normalised"])
def test_an_optional_reward_that_always_fails_leaves_what_the_others_teach(
    combination: str,
) -> None:
    run = rewarded({}, lambda *_: True, required=False)
    run = replace(run, advantage_rule=replace(run.advantage_rule, combination=combination))
    alone = run_of(spec_of())
    metrics, expected = loop.run_epoch(run, 0), loop.run_epoch(alone, 0)
    torch.testing.assert_close(trained_weights(run), trained_weights(alone), rtol=0, atol=1e-7)
    assert metrics["groupsLeftOut"] == 0
    assert metrics["reward"] == pytest.approx(expected["reward"])
    assert metrics["rewards"].keys() == {"light"}
    assert metrics["missingScores"]["peak"] == 4 * images_of_a_prompt(run)


def test_an_epoch_without_any_whole_group_teaches_nothing_and_ends_the_run() -> None:
    run = rewarded({}, lambda *_: True)
    before = trained_weights(run)
    with pytest.raises(RewardFailed, match=r"^no group of draws has all its required scores"):
        loop.run_epoch(run, 0)
    assert torch.equal(trained_weights(run), before)


def test_a_share_without_any_whole_group_makes_no_update() -> None:
    changes: dict[str, object] = {"algorithm.updatesPerEpoch": 4, "data.shuffle": False}
    run = rewarded(changes, lambda prompt, _: prompt == "a three")
    loop.run_epoch(run, 0)
    assert run.updates_done == 3


def test_a_reward_that_compares_sees_the_draws_of_a_step() -> None:
    sizes: list[int] = []

    class Best:
        """1 for the brightest image of the group."""

        batch_size = 8
        group_wise = True

        def score(self, images_N3HW: Tensor, prompts: Sequence[str], _: object) -> Tensor:
            assert len(set(prompts)) == 1
            sizes.append(len(images_N3HW))
            light = images_N3HW.mean(dim=(1, 2, 3))
            return (light == light.max()).float()

    for rows_per_call in (1, 4, 256):
        sizes.clear()
        run = run_of(spec_of({"compute.rowsPerCall": rows_per_call}))
        run = replace(run, reward=Reward([Term("best", 1.0, Best())]))
        metrics = loop.run_epoch(run, 0)
        assert set(sizes) == {run.exploration.plan(0).draws}
        assert metrics["reward"] == pytest.approx(1 / run.exploration.plan(0).draws)
    spec = spec_of({"evaluation": {"steps": 4, "prompts": 3, "imagesPerPrompt": 5}})
    sizes.clear()
    evaluator = evaluator_of(spec, run, prompts_of(spec))
    shared = [replace(evaluator, ranks=replace(run.ranks, rank=r, world=2)) for r in (0, 1)]
    assert [one._share(15, one.ranks.rank).tolist() for one in shared] == [
        [0, 1, 2, 3, 4, 10, 11, 12, 13, 14],
        [5, 6, 7, 8, 9],
    ]
    assert float(evaluator.run().total.sum()) == 3
    assert sizes == [5, 5, 5]


def test_a_reward_that_compares_wants_draws_to_compare() -> None:
    spec = spec_of({**FLOW_GRPO, "rewards": [{"name": "best", "uses": f"{__name__}:OneOfMany"}]})
    with pytest.raises(RewardFailed, match="compares the draws of a branch step, of which there"):
        run_of(spec)


class OneOfMany(Brightness):
    group_wise = True


def test_an_evaluation_says_what_is_missing_and_averages_the_rest() -> None:
    spec = spec_of({"evaluation": {"steps": 4, "prompts": 2, "imagesPerPrompt": 3}})
    run = run_of(spec)

    def evaluated(fails: Callable[[str, int], bool], *, required: bool) -> Any:
        terms = [
            Term("light", 1.0, Brightness()),
            Term("peak", 0.5, Failing(fails), required),
            Term("judge", 0.0, Failing(lambda *_: True)),
        ]
        reward = Reward(terms)
        return replace(evaluator_of(spec, run, prompts_of(spec)), reward=reward).run()

    plain = evaluated(lambda *_: False, required=True)
    some = evaluated(lambda prompt, seen: seen == 0, required=True)
    assert some.total.isnan().tolist() == [True, False, False] * 2
    assert torch.equal(some.total[1:3], plain.total[1:3])
    assert some.scores["judge"].isnan().all()
    masked = evaluated(lambda prompt, seen: seen == 0, required=False)
    peak = plain.scores["peak"]
    expected = plain.scores["light"][0] + 0.5 * peak[1:3].mean()
    assert float(masked.total[0]) == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(RewardFailed, match="no image of this evaluation has all its required"):
        evaluated(lambda *_: True, required=True)
    assert math.isfinite(float(evaluated(lambda *_: True, required=False).total.mean()))
