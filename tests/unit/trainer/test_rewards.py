"""The weighted sum of scorers, and what is said of one that fails."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tempflow_api.errors import RewardFailed
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Reward, Scores, Term, as_bytes, as_floats


@dataclass(frozen=True)
class Fixed:
    """Gives what it was told to, and remembers the sizes of its calls."""

    values: Tensor
    batch_size: int = 100
    calls: list[int] = field(default_factory=list)

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        assert len(images_N3HW) == len(prompts) == len(metadata)
        done = sum(self.calls)
        self.calls.append(len(prompts))
        return self.values[done : done + len(prompts)]


@dataclass(frozen=True)
class Failing:
    batch_size: int = 100

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        raise RuntimeError("the server is away")


def score(reward: Reward, count: int = 3, *, held_out: bool = False) -> dict[str, Tensor]:
    prompts = [f"prompt {i}" for i in range(count)]
    return reward.score(torch.zeros(count, 3, 2, 2), prompts, [{}] * count, held_out=held_out)


def test_the_reward_is_the_weighted_sum_of_what_is_not_held_out() -> None:
    reward = Reward(
        [
            Term("a", 2.0, Fixed(torch.tensor([1.0, 2.0, 3.0]))),
            Term("b", -1.0, Fixed(torch.tensor([0.5, 0.0, 1.0]))),
            Term("c", 0.0, Fixed(torch.tensor([9.0, 9.0, 9.0]))),
        ]
    )
    scores = score(reward, held_out=True)
    assert list(scores) == ["a", "b", "c"]
    assert reward.total(scores).tolist() == [1.5, 4.0, 5.0]


def test_what_is_held_out_is_not_even_asked_in_training() -> None:
    held_out = Fixed(torch.zeros(3))
    reward = Reward([Term("a", 1.0, Fixed(torch.ones(3))), Term("judge", 0.0, held_out)])
    assert list(score(reward)) == ["a"]
    assert held_out.calls == []


def test_a_scorer_is_never_given_more_than_its_batch() -> None:
    scorer = Fixed(torch.arange(8.0), batch_size=3)
    scores = score(Reward([Term("a", 1.0, scorer)]), count=8)
    assert scorer.calls == [3, 3, 2]
    assert scores["a"].tolist() == list(range(8))


def test_scores_are_float32_and_carry_no_gradient() -> None:
    values = torch.ones(3, dtype=torch.float64, requires_grad=True)
    found = score(Reward([Term("a", 1.0, Fixed(values))]))["a"]
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "nan"), (torch.inf, "inf")])
def test_a_score_that_is_not_finite_names_reward_and_prompt(value: float, word: str) -> None:
    reward = Reward([Term("a", 1.0, Fixed(torch.tensor([0.0, value, 0.0])))])
    with pytest.raises(RewardFailed) as caught:
        score(reward)
    assert str(caught.value) == (
        f"reward a gave {word} for an image of prompt 'prompt 1'; a score must be finite"
    )


@pytest.mark.parametrize(
    ("values", "shape"), [(torch.zeros(2), "[2]"), (torch.zeros(3, 1), "[3, 1]")]
)
def test_another_number_of_scores_is_refused(values: Tensor, shape: str) -> None:
    with pytest.raises(RewardFailed) as caught:
        score(Reward([Term("a", 1.0, Fixed(values))]))
    assert str(caught.value) == (
        f"reward a gave scores of shape {shape}, expected one score for each of 3 images"
    )


def test_a_scorer_that_fails_is_named_and_never_counted_as_zero() -> None:
    with pytest.raises(RewardFailed) as caught:
        score(Reward([Term("remote", 1.0, Failing())]))
    assert str(caught.value) == "reward remote: the server is away"


@dataclass(frozen=True)
class Partly:
    """Fails with some images, and says so."""

    values: Sequence[float]
    failed: Mapping[int, str]
    batch_size: int = 100

    def score(self, *_: object) -> Scores:
        return Scores(torch.tensor(self.values), self.failed)


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("left", [0.0, torch.nan, torch.inf])
def test_an_image_that_failed_for_a_reason_has_no_score(required: bool, left: float) -> None:
    scorer = Partly([1.0, left, 3.0], {1: "refused by the server"})
    found = score(Reward([Term("a", 1.0, scorer, required)]))["a"]
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == [1.0, 3.0]


def test_a_reason_does_not_excuse_another_image() -> None:
    scorer = Partly([torch.nan, torch.nan, 3.0], {1: "refused"})
    with pytest.raises(RewardFailed, match="gave nan for an image of prompt 'prompt 0'"):
        score(Reward([Term("a", 1.0, scorer)]))


def test_a_reason_for_an_image_that_was_not_asked_about_is_refused() -> None:
    with pytest.raises(RewardFailed, match=r"names images \[7\] as failed, of 3"):
        score(Reward([Term("a", 1.0, Partly([1.0, 2.0, 3.0], {7: "refused"}))]))


def test_an_optional_reward_that_fails_has_no_scores_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    terms = [
        Term("sure", 1.0, Fixed(torch.ones(3))),
        Term("away", 1.0, Failing(), required=False),
        Term("wild", 1.0, Fixed(torch.tensor([1.0, torch.inf, 2.0])), required=False),
    ]
    scores = score(Reward(terms))
    assert scores["away"].isnan().all()
    assert scores["wild"].isnan().tolist() == [False, True, False]
    assert scores["sure"].tolist() == [1.0, 1.0, 1.0]
    assert "reward away: no score for 3 images: the server is away" in caplog.messages


def test_only_the_calls_that_fail_have_no_scores() -> None:
    class Flaky(Fixed):
        def score(
            self,
            images_N3HW: Tensor,
            prompts: Sequence[str],
            metadata: Sequence[Mapping[str, object]],
        ) -> Tensor:
            if "prompt 2" in prompts:
                raise OSError("connection lost")
            return torch.ones(len(images_N3HW))

    scorer = Flaky(torch.zeros(0), batch_size=2)
    found = score(Reward([Term("a", 1.0, scorer, required=False)]), count=6)["a"]
    assert found.isnan().tolist() == [False, False, True, True, False, False]


def test_an_error_of_any_kind_is_the_rewards_own() -> None:
    class Buggy(Fixed):
        def score(self, *_: object) -> Tensor:
            raise KeyError("count")

    with pytest.raises(RewardFailed, match=r"^reward a: KeyError: 'count'$"):
        score(Reward([Term("a", 1.0, Buggy(torch.zeros(3)))]))


@dataclass(frozen=True)
class Rank:
    """Compares: the place of each image in its group, by brightness."""

    batch_size: int = 4
    group_wise: bool = True

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        assert len(set(prompts)) == 1
        return images_N3HW.mean(dim=(1, 2, 3)).argsort().argsort().float()


def test_a_scorer_that_compares_sees_one_whole_group_at_a_time() -> None:
    light = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.8, 0.5])
    images = light.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    groups = [7, 3, 7, 3, 7, 3]
    reward = Reward([Term("rank", 1.0, Rank())])
    assert reward.group_wise
    found = reward.score(images, [f"of {g}" for g in groups], [{}] * 6, groups=groups)
    assert found["rank"].tolist() == [0, 2, 1, 0, 2, 1]
    with pytest.raises(RewardFailed, match="takes groups of at most 4 images, this one has 5"):
        reward.score(images[:5], ["a"] * 5, [{}] * 5, groups=[0] * 5)
    with pytest.raises(RewardFailed, match="compares the images of a group; none is named"):
        reward.score(images, ["a"] * 6, [{}] * 6)


def test_images_are_bytes_or_floats_and_scorers_see_floats() -> None:
    seen: list[Tensor] = []

    class Seeing(Fixed):
        def score(self, images_N3HW: Tensor, *_: object) -> Tensor:
            seen.append(images_N3HW)
            return torch.ones(len(images_N3HW))

    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    reward = Reward([Term("a", 1.0, Seeing(torch.zeros(0)))])
    for images in (levels, as_floats(levels), as_floats(levels).double()):
        reward.score(images, ["a", "b"], [{}, {}])
    assert all(image.dtype == torch.float32 and image.max() == 1 for image in seen)
    assert all(torch.equal(as_bytes(image), levels) for image in seen)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 2, 2), r"images of shape \[3, 2, 2\], expected \[N, 3, H, W\]"),
        (torch.zeros(1, 1, 2, 2), r"images of shape \[1, 1, 2, 2\]"),
        (torch.full((1, 3, 2, 2), -1.0), r"images from -1.0 to -1.0, expected floats in \[0, 1\]"),
        (torch.full((1, 3, 2, 2), 255.0), "images from 255.0 to 255.0"),
        (torch.full((1, 3, 2, 2), torch.nan), "images from nan to nan"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.int32), "images of torch.int32, expected uint8"),
    ],
)
def test_images_of_another_kind_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(RewardFailed, match=message):
        Reward([Term("a", 1.0, Fixed(torch.ones(1)))]).score(images, ["a"], [{}])


def test_every_built_in_reward_can_be_built_by_its_name() -> None:
    """Those that need no model from elsewhere; each of the others has a test with one."""
    names = [name for name in registry.REWARDS if name.startswith(("digit-", "jpeg-"))]
    assert len(names) >= 7
    terms = [RewardTerm(name=name) for name in names]
    assert [term.name for term in registry.build(terms).terms] == names


def build(**term: object) -> Reward:
    return registry.build([RewardTerm.model_validate(term)])


def test_parameters_reach_the_scorer_with_their_types() -> None:
    reward = build(name="digit-ink", parameters={"target": "0.25", "batch_size": "7"})
    scorer = reward.terms[0].scorer
    assert scorer.batch_size == 7
    quarter_full = torch.full((1, 3, 14, 14), 0.25 * (20 / 28) ** 2)
    found = scorer.score(quarter_full, ["a one"], [{}])
    assert isinstance(found, Tensor)
    assert float(found) == pytest.approx(0, abs=1e-6)


HAS = "This version has digit-log-probability"


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"name": "digit-inc"},
            f"spec.rewards[0].name: no reward 'digit-inc'; did you mean 'digit-ink'? {HAS}",
        ),
        ({"name": "zzz"}, f"spec.rewards[0].name: no reward 'zzz'. {HAS}"),
        (
            {"name": "digit-ink", "parameters": {"goal": "1"}},
            "spec.rewards[0].parameters.goal: digit-ink has no such parameter; it has target, ",
        ),
        (
            {"name": "digit-ink", "parameters": {"target": "much"}},
            "spec.rewards[0].parameters.target: got 'much', expected float",
        ),
    ],
    ids=["near name", "far name", "unknown parameter", "value of another type"],
)
def test_a_term_that_does_not_fit_says_what_would(term: dict[str, object], message: str) -> None:
    with pytest.raises(RewardFailed) as caught:
        build(**term)
    assert str(caught.value).startswith(message)
    for name in registry.REWARDS if HAS in message else []:
        assert name in str(caught.value)


@pytest.mark.parametrize("required", [True, False])
def test_memory_that_runs_out_is_no_missing_score(required: bool) -> None:
    class Large:
        batch_size = 4

        def score(self, *_: object) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    reward = Reward([Term("large", 1.0, Large(), required=required)])
    with pytest.raises(torch.OutOfMemoryError):
        reward.score(torch.zeros(1, 3, 8, 8), ["a"], [{}])
