"""Rewards of the digits family: on real digits, on constructed pictures, and as laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tempflow_trainer.rewards.digits import (
    DIGIT_NAMES,
    LOG_PROBABILITY_FLOOR,
    DigitJudge,
    DigitLogProbability,
    DigitProbability,
    Ink,
    StrokeContrast,
    Symmetry,
    digit_of,
    diversity_within_digit,
    load_classifier,
    load_judge,
)

SAMPLE = Path(__file__).parents[2] / "data" / "digits_test_sample.safetensors"


class Scorer(Protocol):
    @property
    def batch_size(self) -> int: ...

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor: ...


SCORERS: list[Scorer] = [
    DigitLogProbability(),
    DigitProbability(),
    DigitJudge(),
    Ink(),
    StrokeContrast(),
    Symmetry(),
]


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, list[int]]:
    """200 real digits of the test split, [200, 3, 14, 14], and what they are."""
    sample = safetensors.torch.load_file(SAMPLE)
    images_N3HW = (sample["images"] / 255)[:, None].expand(-1, 3, -1, -1)
    return images_N3HW, sample["labels"].tolist()


def prompts_of(digits: Sequence[int]) -> list[str]:
    return [f"a {DIGIT_NAMES[digit]}" for digit in digits]


def score(scorer: Scorer, images_N3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    return scorer.score(images_N3HW, prompts, [{}] * len(prompts))


def picture(*rows: str) -> Tensor:
    """[1, 3, H, W] of text: "#" is full ink, "." is paper, "+" is half ink."""
    values = torch.tensor([[{"#": 1.0, "+": 0.5, ".": 0.0}[mark] for mark in row] for row in rows])
    return values.expand(1, 3, -1, -1)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
def test_scores_move_with_their_images(scorer: Scorer, real: tuple[Tensor, list[int]]) -> None:
    images_N3HW, digits = real
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    prompts = prompts_of([(digit + (row % 2)) % 10 for row, digit in enumerate(digits)])
    scores_N = score(scorer, images_N3HW, prompts)
    moved_N = score(scorer, images_N3HW[order], [prompts[row] for row in order.tolist()])
    assert scores_N.shape == (200,)
    assert scores_N.dtype == torch.float32
    assert scores_N.std() > 0
    torch.testing.assert_close(moved_N, scores_N[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
def test_no_image_has_a_part_in_the_score_of_another(
    scorer: Scorer, real: tuple[Tensor, list[int]]
) -> None:
    images_N3HW, digits = real
    together_N = score(scorer, images_N3HW[:7], prompts_of(digits[:7]))
    alone = score(scorer, images_N3HW[:1], prompts_of(digits[:1]))
    torch.testing.assert_close(alone, together_N[:1], rtol=1e-4, atol=1e-4)


def test_classifier_and_judge_read_real_digits_and_mostly_agree(
    real: tuple[Tensor, list[int]],
) -> None:
    images_N3HW, digits = real
    classified_N = load_classifier()(images_N3HW[:, 0]).argmax(dim=1)
    judged_N = load_judge().find(images_N3HW[:, 0])
    assert (classified_N == torch.tensor(digits)).float().mean() >= 0.96
    assert (judged_N == torch.tensor(digits)).float().mean() >= 0.96
    assert (classified_N == judged_N).float().mean() >= 0.95


@pytest.mark.parametrize("scorer", [DigitLogProbability(), DigitProbability(), DigitJudge()])
def test_the_right_prompt_earns_more_than_a_wrong_one(
    scorer: Scorer, real: tuple[Tensor, list[int]]
) -> None:
    images_N3HW, digits = real
    right_N = score(scorer, images_N3HW, prompts_of(digits))
    wrong_N = score(scorer, images_N3HW, prompts_of([(digit + 3) % 10 for digit in digits]))
    assert (right_N > wrong_N).float().mean() >= 0.95


def test_probability_is_the_exponential_and_sums_to_one(real: tuple[Tensor, list[int]]) -> None:
    images_N3HW, digits = real
    p_N = score(DigitProbability(), images_N3HW, prompts_of(digits))
    log_p_N = score(DigitLogProbability(), images_N3HW, prompts_of(digits))
    above = log_p_N > LOG_PROBABILITY_FLOOR
    torch.testing.assert_close(log_p_N[above].exp(), p_N[above])
    each = [score(DigitProbability(), images_N3HW, prompts_of([d] * 200)) for d in range(10)]
    torch.testing.assert_close(torch.stack(each).sum(dim=0), torch.ones(200))


def test_log_probability_stops_at_its_floor(real: tuple[Tensor, list[int]]) -> None:
    images_N3HW, _ = real
    each = [score(DigitLogProbability(), images_N3HW, prompts_of([d] * 200)) for d in range(10)]
    assert torch.stack(each).min() == LOG_PROBABILITY_FLOOR
    assert torch.stack(each).max() <= 0


def test_judge_still_reads_bolder_and_noisy_digits(real: tuple[Tensor, list[int]]) -> None:
    images_N3HW, digits = real
    bold_N3HW = images_N3HW.sqrt()
    noise = torch.randn(200, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    noisy_N3HW = (images_N3HW + 0.1 * noise).clamp(0, 1)
    for changed_N3HW in (bold_N3HW, noisy_N3HW):
        assert score(DigitJudge(), changed_N3HW, prompts_of(digits)).mean() >= 0.9


def test_ink_is_best_at_its_target_and_falls_on_both_sides() -> None:
    # 50 of 196 pixels full: half of the 10x10 box in which digits are drawn.
    half_box = torch.zeros(1, 3, 14, 14)
    half_box[:, :, :5, :10] = 1.0
    images_N3HW = torch.cat([half_box * share for share in (0.0, 0.5, 1.0)])
    assert score(Ink(target=0.25), images_N3HW, ["a one"] * 3).tolist() == pytest.approx(
        [-0.25, 0.0, -0.25], abs=1e-6
    )
    assert score(Ink(), images_N3HW, ["a one"] * 3).argmax() == 2


def test_contrast_falls_with_grey_ink() -> None:
    black = picture("#..", "#..", "#..")
    grey = picture("+..", "+..", "+..")
    mixed = picture("#..", "+..", "#..")
    images_N3HW = torch.cat([black, grey, mixed, torch.zeros_like(black)])
    assert score(StrokeContrast(), images_N3HW, ["1"] * 4).tolist() == pytest.approx(
        [1.0, 0.5, 0.9, 0.0]
    )


def test_symmetry_counts_the_ink_that_mirrors() -> None:
    mirrored = picture("#.#", ".#.", "#.#")
    one_sided = picture("#..", "#..", "#..")
    partly = picture("#.#", "#..", "#.#")
    images_N3HW = torch.cat([mirrored, one_sided, partly, torch.zeros_like(partly)])
    scores_N = score(Symmetry(), images_N3HW, ["8"] * 4)
    assert scores_N.tolist() == pytest.approx([1.0, 0.0, 0.8, 0.0])
    torch.testing.assert_close(score(Symmetry(), images_N3HW.flip(3), ["8"] * 4), scores_N)


def test_diversity_is_the_distance_within_a_digit() -> None:
    white, black = torch.zeros(1, 3, 14, 14), torch.ones(1, 3, 14, 14)
    half_black = black * 0.5
    assert diversity_within_digit(torch.cat([white, white]), [3, 3]) == 0.0
    assert diversity_within_digit(torch.cat([white, black]), [3, 3]) == pytest.approx(1.0)
    # Digit 1 has no pair; digits 3 and 5 count alike though 5 has more pairs.
    images_N3HW = torch.cat([white, half_black, black, white, white, white])
    assert diversity_within_digit(images_N3HW, [3, 3, 1, 5, 5, 5]) == pytest.approx(0.25)


def test_diversity_needs_a_pair() -> None:
    with pytest.raises(ValueError, match=r"no digit has two images among \[1, 2\]"):
        diversity_within_digit(torch.zeros(2, 3, 14, 14), [1, 2])


@pytest.mark.parametrize("digit", range(10))
def test_a_digit_is_found_by_name_and_by_numeral(digit: int) -> None:
    for word in (DIGIT_NAMES[digit], DIGIT_NAMES[digit].upper(), str(digit)):
        for form in ("{}", "a {}", "the digit {}", "a handwritten {}"):
            assert digit_of(form.format(word)) == digit


@pytest.mark.parametrize(
    ("prompt", "found"), [("a cat", 0), ("", 0), ("a threefold 33", 0), ("two 3", 2)]
)
def test_a_prompt_without_exactly_one_digit_is_refused(prompt: str, found: int) -> None:
    with pytest.raises(ValueError, match=rf"{found} digits in prompt '{prompt}'.*zero.*nine.*0"):
        digit_of(prompt)


def test_wrong_shapes_and_counts_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 14, 14\), expected \[N, 3, H, W\]"):
        score(Ink(), torch.zeros(1, 1, 14, 14), ["1"])
    with pytest.raises(ValueError, match=r"\(28, 28\) pixels, expected \(14, 14\)"):
        score(DigitJudge(), torch.zeros(1, 3, 28, 28), ["1"])
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        score(DigitJudge(), torch.zeros(2, 3, 14, 14), ["1"])
