"""The schedules of the families, against numbers computed apart from this code."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tempflow_trainer.algorithm.schedule import Schedule
from tests.numerics import schedules
from tests.numerics.schedules import any_schedule, law

SD3_10 = [
    1.0,
    0.960129,
    0.913349,
    0.857692,
    0.790368,
    0.707278,
    0.602151,
    0.464876,
    0.278049,
    0.008929,
    0.0,
]
FLUX_512_10 = [
    1.0,
    0.94413,
    0.88250,
    0.81416,
    0.73797,
    0.65249,
    0.55590,
    0.44589,
    0.31945,
    0.17261,
    0.0,
]


def test_the_schedule_of_stable_diffusion_3() -> None:
    assert schedules.sd3(10).sigmas.tolist() == pytest.approx(SD3_10, abs=1e-6)


@pytest.mark.parametrize("steps", [2, 10, 28, 40, 160])
def test_the_last_noise_of_stable_diffusion_3_does_not_depend_on_the_steps(steps: int) -> None:
    assert float(schedules.sd3(steps).sigmas[-2]) == pytest.approx(0.008929, abs=1e-6)


def test_the_schedule_of_flux_at_512_pixels() -> None:
    assert schedules.flux(10).sigmas.tolist() == pytest.approx(FLUX_512_10, abs=1e-5)


def test_a_larger_image_of_flux_stays_noisy_for_longer() -> None:
    assert (schedules.flux(10, 4096).sigmas[1:-1] > schedules.flux(10, 1024).sigmas[1:-1]).all()


def test_the_schedule_of_qwen_image_ends_at_two_hundredths() -> None:
    assert float(schedules.qwen(10).sigmas[-2]) == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize("steps", [4, 10, 40])
@pytest.mark.parametrize("tokens", [256, 1024, 2304, 4096])
def test_shifts_of_the_shipped_configurations_by_hand(tokens: int, steps: int) -> None:
    """s = e^mu / (e^mu + 1 / u - 1) with mu linear in the tokens: 0.5 at 256, 1.15 at 4,096 for
    FLUX.1 and 0.9 at 8,192 for Qwen-Image, whose levels are then stretched to end at 0.02."""

    def shifted(mu: float) -> Tensor:
        grid_T = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        return math.exp(mu) / (math.exp(mu) + 1 / grid_T - 1)

    def close(schedule: Schedule, expected_T: Tensor) -> None:
        found_T = schedule.sigmas[:-1]
        torch.testing.assert_close(found_T, expected_T, rtol=0.0, atol=1e-6)

    close(schedules.flux(steps, tokens), shifted(0.5 + 0.65 * (tokens - 256) / 3840))
    plain_T = shifted(0.5 + 0.4 * (tokens - 256) / 7936)
    stretched_T = 1 - (1 - plain_T) * 0.98 / (1 - plain_T[-1])
    close(schedules.qwen(steps, tokens), stretched_T)


@law
@given(schedule=any_schedule)
def test_noise_falls_from_one_to_zero(schedule: Schedule) -> None:
    assert schedule.sigmas.dtype == torch.float64
    assert (float(schedule.sigmas[0]), float(schedule.sigmas[-1])) == (1.0, 0.0)
    assert (schedule.dt_T < 0).all()
    assert len(schedule.dt_T) == schedule.steps
    assert float(schedule.dt_T.sum()) == pytest.approx(-1)


@pytest.mark.parametrize(
    "sigmas",
    [[1.0], [1.0, 1.0, 0.0], [0.5, 0.8, 0.0], [1.2, 0.5, 0.0], [1.0, 0.5, -0.1]],
    ids=["one level", "level twice", "rising", "above one", "below zero"],
)
def test_what_no_trajectory_can_follow_is_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="noise levels"):
        Schedule(torch.tensor(sigmas, dtype=torch.float64))


def test_noise_levels_in_single_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        Schedule(torch.tensor([1.0, 0.0]))
