"""The weights of the branch steps: published constants are a property of one schedule each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempflow_trainer.algorithm import sde, weighting
from tempflow_trainer.algorithm.schedule import Schedule
from tests.numerics import schedules
from tests.numerics.schedules import any_noise_level, any_schedule, law

TRAINED = tuple(range(9))
SD3_WEIGHTS = [1.5766, 1.6733, 1.2075, 1.0043, 0.8824, 0.7946, 0.7186, 0.6351, 0.5076]
FLUX_WEIGHTS = [1.7362, 1.7718, 1.2438, 1.0031, 0.8519, 0.7394, 0.6443, 0.5538, 0.4558]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(schedules.sd3(10), SD3_WEIGHTS), (schedules.flux(10), FLUX_WEIGHTS)],
    ids=["sd3", "flux 512"],
)
def test_weights_of_ten_steps(schedule: Schedule, expected: list[float]) -> None:
    weights_S = weighting.weights_S("noise-aware", sde.transitions("flow", schedule, 0.7, TRAINED))
    assert weights_S.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("schedule", "noise_level", "constant"),
    [
        (schedules.sd3(10), 0.7, 2.2522),
        (schedules.flux(10, 4096), 0.9, 1.7260),
        (schedules.flux(10, 1024), 0.9, 1.9291),
        (schedules.qwen(10), 1.2, 1.5329),
    ],
    ids=["sd3", "flux 1024", "flux 512", "qwen-image 512"],
)
def test_the_constants_of_the_reference_code_come_out_of_the_schedules(
    schedule: Schedule, noise_level: float, constant: float
) -> None:
    eta_T = sde.noise_std_T(schedule, noise_level)
    weights_S = weighting.weights_S(
        "noise-aware", sde.transitions("flow", schedule, noise_level, TRAINED)
    )
    assert (weights_S / eta_T[:9]).tolist() == pytest.approx([constant] * 9, abs=1e-4)


@st.composite
def schedule_and_steps(draw: st.DrawFn) -> tuple[Schedule, tuple[int, ...]]:
    schedule = draw(any_schedule)
    steps = draw(st.sets(st.integers(0, schedule.steps - 1), min_size=1))
    return schedule, tuple(sorted(steps))


@law
@given(case=schedule_and_steps(), noise_level=any_noise_level, other=any_noise_level)
def test_weights_average_to_one_and_do_not_depend_on_the_noise_level(
    case: tuple[Schedule, tuple[int, ...]], noise_level: float, other: float
) -> None:
    schedule, steps = case
    weights_S = weighting.weights_S(
        "noise-aware", sde.transitions("flow", schedule, noise_level, steps)
    )
    assert float(weights_S.sum()) == pytest.approx(len(steps))
    assert (weights_S > 0).all()
    others_S = weighting.weights_S("noise-aware", sde.transitions("flow", schedule, other, steps))
    torch.testing.assert_close(weights_S, others_S)


@law
@given(case=schedule_and_steps())
def test_without_weighting_every_step_counts_the_same(
    case: tuple[Schedule, tuple[int, ...]],
) -> None:
    schedule, steps = case
    weights_S = weighting.weights_S("none", sde.transitions("flow", schedule, 0.7, steps))
    assert weights_S.tolist() == [1.0] * len(steps)
