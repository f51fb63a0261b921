"""The stochastic step: its marginals, its densities, and the scales that follow from them."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempflow_trainer.algorithm import loss, sde
from tempflow_trainer.algorithm.schedule import Schedule
from tests.numerics import schedules
from tests.numerics.schedules import any_noise_level, any_schedule, law
from tests.numerics.toys import MEAN, VARIANCE, gaussian_velocity, path_variance

A = 0.7


def factors(schedule: Schedule, noise_level: float, kind: str = "flow") -> dict[str, Tensor]:
    """Of every step of the schedule."""
    steps = sde.transitions(kind, schedule, noise_level)
    return {"x_factor_B": steps.x_factor_S, "v_factor_B": steps.v_factor_S}


def every_step(schedule: Schedule, x_T: Tensor, v_T: Tensor, noise_level: float) -> Tensor:
    """Mean of each step of the schedule, row k at state x_T[k]; one dimension."""
    return sde.step_mean(
        x_T.view(-1, 1, 1, 1),
        v_T.view(-1, 1, 1, 1),
        **factors(schedule, noise_level),
    ).flatten()


def affine(schedule: Schedule, noise_level: float) -> tuple[Tensor, Tensor]:
    """Slope and offset of each step of the Gaussian toy, whose steps are affine in the state."""
    t = schedule.sigmas[:-1]
    at_0, at_1 = (
        every_step(schedule, x, gaussian_velocity(x, t), noise_level).double()
        for x in (torch.zeros_like(t), torch.ones_like(t))
    )
    return at_1 - at_0, at_0


def moments(schedule: Schedule, noise_level: float, *, steps: int) -> tuple[float, float]:
    """Exact mean and variance of the toy after ``steps`` stochastic steps from pure noise."""
    slope, offset = affine(schedule, noise_level)
    eta = sde.noise_std_T(schedule, noise_level)
    mean, variance = 0.0, 1.0
    for k in range(steps):
        mean = float(slope[k]) * mean + float(offset[k])
        variance = float(slope[k]) ** 2 * variance + float(eta[k]) ** 2
    return mean, variance


def deterministic_variance(schedule: Schedule, *, steps: int) -> float:
    """The same of deterministic steps."""
    variance = 1.0
    for k in range(steps):
        t, dt = schedule.sigmas[k], float(schedule.dt_T[k])
        ends = [
            float(sde.ode_step(x, gaussian_velocity(x, t), dt))
            for x in (torch.zeros(1).double(), torch.ones(1).double())
        ]
        variance *= (ends[1] - ends[0]) ** 2
    return variance


@law
@given(schedule=any_schedule, noise_level=any_noise_level, x=st.floats(-3, 3))
def test_the_drift_is_the_velocity_less_half_g2_times_the_true_score(
    schedule: Schedule, noise_level: float, x: float
) -> None:
    t = schedule.sigmas[:-1]
    x_T = torch.full_like(t, x)
    v_T = gaussian_velocity(x_T, t)
    score_T = -(x_T - (1 - t) * MEAN) / path_variance(t)
    g_T = sde.noise_std_T(schedule, noise_level) / (-schedule.dt_T).sqrt()
    expected_T = x_T + schedule.dt_T * (v_T - g_T**2 / 2 * score_T)
    found_T = every_step(schedule, x_T, v_T, noise_level)
    torch.testing.assert_close(found_T, expected_T.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "deterministic", "stochastic"),
    [
        (10, 0.12900, 0.17726),
        (40, 0.21578, 0.22983),
        (160, 0.24109, 0.24563),
        (1000, 0.24849, 0.24968),
    ],
)
def test_variance_of_the_drawn_data(steps: int, deterministic: float, stochastic: float) -> None:
    schedule = schedules.sd3(steps)
    mean, variance = moments(schedule, A, steps=steps)
    assert mean == pytest.approx(MEAN, abs=1e-4)
    assert variance == pytest.approx(stochastic, abs=3e-5)
    assert deterministic_variance(schedule, steps=steps) == pytest.approx(deterministic, abs=3e-5)


@pytest.mark.parametrize("schedule_of", [schedules.sd3, schedules.flux, schedules.qwen])
def test_both_kinds_of_steps_converge_to_the_data(schedule_of: Callable[[int], Schedule]) -> None:
    errors = []
    for steps in (20, 80, 320):
        schedule = schedule_of(steps)
        errors.append(
            (
                abs(moments(schedule, A, steps=steps)[1] - VARIANCE),
                abs(deterministic_variance(schedule, steps=steps) - VARIANCE),
            )
        )
    for coarse, fine in pairwise(errors):
        assert fine[0] < coarse[0] / 2
        assert fine[1] < coarse[1] / 2


def test_variance_after_the_first_step() -> None:
    schedule = schedules.sd3(10)
    assert deterministic_variance(schedule, steps=1) == pytest.approx(0.92185, abs=1e-5)
    assert moments(schedule, A, steps=1)[1] == pytest.approx(1.00141, abs=1e-5)
    assert float(path_variance(schedule.sigmas[1])) == pytest.approx(0.92225, abs=1e-5)


@law
@given(schedule=any_schedule)
def test_without_noise_the_mean_is_the_deterministic_step(schedule: Schedule) -> None:
    x_T = torch.linspace(-2, 2, schedule.steps)
    v_T = x_T.cos()
    expected_T = torch.stack(
        [sde.ode_step(x_T[k], v_T[k], float(schedule.dt_T[k])) for k in range(schedule.steps)]
    )
    torch.testing.assert_close(every_step(schedule, x_T, v_T, 0.0), expected_T)
    torch.testing.assert_close(every_step(schedule, x_T, v_T, 1e-4), expected_T)


@law
@given(schedule=any_schedule, noise_level=any_noise_level, factor=st.floats(0.1, 10))
def test_noise_of_the_first_step_is_the_noise_level_and_all_scale_with_it(
    schedule: Schedule, noise_level: float, factor: float
) -> None:
    eta_T = sde.noise_std_T(schedule, noise_level)
    assert float(eta_T[0]) == pytest.approx(noise_level, rel=1e-12)
    assert (eta_T > 0).all()
    scaled_T = sde.noise_std_T(schedule, factor * noise_level)
    torch.testing.assert_close(scaled_T, factor * eta_T)


def test_the_first_step_is_found_by_its_place_and_not_by_a_noise_of_exactly_one() -> None:
    almost = schedules.sd3(10).sigmas.clone()
    almost[0] -= 1e-7
    eta_T = sde.noise_std_T(Schedule(almost), A)
    torch.testing.assert_close(eta_T, sde.noise_std_T(schedules.sd3(10), A), rtol=1e-4, atol=0.0)


EXPECTED_LOG_PROB = [
    -1.0623,
    -1.1218,
    -0.7956,
    -0.6113,
    -0.4819,
    -0.3771,
    -0.2766,
    -0.1531,
    0.0711,
    3.6518,
]


def test_expected_log_probability_of_a_fresh_draw() -> None:
    eta_T = sde.noise_std_T(schedules.sd3(10), A)
    mean = torch.zeros(10, 2, 4, 4)
    # The mean square of this noise is one, as that of a fresh draw is expected to be.
    noise = torch.ones(2, 4, 4)
    noise[0] = -1
    found_T = sde.log_prob(mean + eta_T.float()[:, None, None, None] * noise, mean, eta_T)
    assert found_T.tolist() == pytest.approx(EXPECTED_LOG_PROB, abs=1e-4)


@law
@given(
    rows=st.integers(1, 3),
    draws=st.integers(1, 4),
    channels=st.integers(1, 4),
    side=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_log_probability_is_the_mean_over_the_dimensions(
    rows: int, draws: int, channels: int, side: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean_BCHW = torch.randn(rows, channels, side, side, generator=generator)
    std_B = torch.rand(rows, generator=generator) + 0.1
    draw_BKCHW = torch.randn(rows, draws, channels, side, side, generator=generator)
    found_BK = sde.log_prob(draw_BKCHW, mean_BCHW[:, None], std_B[:, None])
    normal = torch.distributions.Normal(mean_BCHW[:, None], std_B.view(-1, 1, 1, 1, 1))
    expected_BK = normal.log_prob(draw_BKCHW).mean(dim=(2, 3, 4))
    torch.testing.assert_close(found_BK, expected_BK, rtol=1e-5, atol=1e-4)


def velocity_factor(schedule: Schedule, noise_level: float) -> Tensor:
    """B of every step: how far the mean moves with the velocity."""
    v_T = torch.ones(schedule.steps, dtype=torch.float64)
    zero_T = torch.zeros_like(v_T)
    return every_step(schedule, zero_T, v_T, noise_level).double()


@law
@given(schedule=any_schedule, noise_level=any_noise_level, side=st.integers(1, 4))
def test_the_gradient_of_a_log_probability_is_its_noise(
    schedule: Schedule, noise_level: float, side: int
) -> None:
    steps = schedule.steps
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(steps, 2, side, side, generator=generator) for _ in range(2))
    v = torch.randn(steps, 2, side, side, generator=generator, requires_grad=True)
    eta_T = sde.noise_std_T(schedule, noise_level)
    mean = sde.step_mean(
        x,
        v,
        **factors(schedule, noise_level),
    )
    eta = eta_T.float().view(-1, 1, 1, 1)
    sde.log_prob(mean.detach() + eta * noise, mean, eta_T).sum().backward()
    dims = 2 * side * side
    scale_T = velocity_factor(schedule, noise_level) / (eta_T * dims)
    expected = noise * scale_T.float().view(-1, 1, 1, 1)
    assert v.grad is not None
    # The draw is rounded near its mean, so where the noise is small its noise is inexact.
    tolerance = float(mean.detach().abs().max() * 1e-6 / eta_T.min())
    torch.testing.assert_close(v.grad, expected, rtol=1e-4, atol=tolerance)


GRADIENT_SCALE = [0.0570, 0.0784, 0.1292, 0.1880, 0.2640, 0.3710, 0.5356, 0.8248, 1.4867]
TIMES_NOISE = [0.0399, 0.0582, 0.0693, 0.0838, 0.1034, 0.1309, 0.1709, 0.2326, 0.3351]


def test_gradients_grow_26_fold_over_the_steps_and_8_fold_when_weighted() -> None:
    schedule = schedules.sd3(10)
    eta_T = sde.noise_std_T(schedule, A)
    scale_T = velocity_factor(schedule, A).abs() / eta_T
    assert scale_T[:9].tolist() == pytest.approx(GRADIENT_SCALE, abs=1e-4)
    assert (scale_T * eta_T)[:9].tolist() == pytest.approx(TIMES_NOISE, abs=1e-4)


@law
@given(schedule=any_schedule, noise_level=any_noise_level)
def test_times_the_noise_the_gradient_is_proportional_to_the_step(
    schedule: Schedule, noise_level: float
) -> None:
    factor_T = velocity_factor(schedule, noise_level).abs()
    size_T = schedule.dt_T.abs()
    assert float(factor_T[0]) == pytest.approx(float(size_T[0]), rel=1e-5)
    expected_T = size_T[1:] * (1 + noise_level**2 / 2)
    torch.testing.assert_close(factor_T[1:], expected_T, rtol=1e-5, atol=1e-7)


KL_COEFFICIENT = [0.00162, 0.00307, 0.00835, 0.01767, 0.03486, 0.06882, 0.14346, 0.34015, 1.10521]


def kl_of(schedule: Schedule, noise_level: float, v: Tensor, v_reference: Tensor) -> Tensor:
    """Divergence of every step from that with the other velocity."""
    x = torch.zeros_like(v)
    mean, reference = (
        sde.step_mean(x, velocity, **factors(schedule, noise_level))
        for velocity in (v, v_reference)
    )
    return loss.kl_B(mean, reference, sde.noise_std_T(schedule, noise_level))


def test_kl_of_a_unit_difference_of_velocity() -> None:
    schedule = schedules.sd3(10)
    v = torch.ones(10, 2, 3, 3)
    found_T = kl_of(schedule, A, v, torch.zeros_like(v))
    assert found_T[:9].tolist() == pytest.approx(KL_COEFFICIENT, abs=1e-5)


@law
@given(schedule=any_schedule, noise_level=any_noise_level)
def test_kl_is_that_of_two_normal_distributions(schedule: Schedule, noise_level: float) -> None:
    generator = torch.Generator().manual_seed(1)
    v, other = (torch.randn(schedule.steps, 2, 3, 3, generator=generator) for _ in range(2))
    found_T = kl_of(schedule, noise_level, v, other)
    difference_T = (v - other).square().mean(dim=(1, 2, 3)).double()
    eta_T = sde.noise_std_T(schedule, noise_level)
    coefficient_T = velocity_factor(schedule, noise_level) ** 2 / (2 * eta_T**2)
    expected_T = (coefficient_T * difference_T).float()
    torch.testing.assert_close(found_T, expected_T, rtol=1e-4, atol=1e-7)
    assert (kl_of(schedule, noise_level, v, v) == 0).all()


def test_log_probability_of_the_constant_is_that_of_a_standard_normal() -> None:
    at_mean = sde.log_prob(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.ones(1))
    assert float(at_mean) == pytest.approx(-0.5 * math.log(2 * math.pi))
