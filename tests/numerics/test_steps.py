"""The other stochastic steps, merged steps, GRPO-Guard's ratio and the forms of the divergence."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempflow_trainer.algorithm import loss, sde, weighting
from tempflow_trainer.algorithm.schedule import Schedule
from tests.numerics import schedules
from tests.numerics.schedules import any_schedule, law
from tests.numerics.toys import MEAN, VARIANCE, gaussian_velocity, path_variance

KINDS = ("flow", "dance", "cps")
any_kind = st.sampled_from(KINDS)
noise_of_any_kind = st.floats(0.05, 0.95)
three_families = pytest.mark.parametrize(
    "schedule",
    [schedules.sd3(), schedules.flux(), schedules.flux(image_tokens=4096), schedules.qwen()],
    ids=["sd3", "flux 512", "flux 1024", "qwen-image 512"],
)


def mean(steps: sde.Transitions, x_S: Tensor, v_S: Tensor) -> Tensor:
    """Of every step, at one dimension, float64."""
    return steps.x_factor_S * x_S + steps.v_factor_S * v_S


def variance(schedule: Schedule, kind: str, noise_level: float, *, steps: int) -> float:
    """Of the Gaussian toy after so many stochastic steps, exactly."""
    of, t = sde.transitions(kind, schedule, noise_level), schedule.sigmas[:-1]
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    slope = mean(of, one, gaussian_velocity(one, t)) - mean(of, zero, gaussian_velocity(zero, t))
    found = 1.0
    for k in range(steps):
        found = float(slope[k]) ** 2 * found + float(of.noise_std_S[k]) ** 2
    return found


@law
@given(schedule=any_schedule, noise_level=noise_of_any_kind, x=st.floats(-3, 3))
def test_dance_steps_have_the_drift_of_the_true_score_and_the_same_noise_everywhere(
    schedule: Schedule, noise_level: float, x: float
) -> None:
    t, of = schedule.sigmas[:-1], sde.transitions("dance", schedule, noise_level)
    x_T = torch.full_like(t, x)
    v_T = gaussian_velocity(x_T, t)
    score_T = -(x_T - (1 - t) * MEAN) / path_variance(t)
    expected_T = x_T + schedule.dt_T * (v_T - noise_level**2 / 2 * score_T)
    torch.testing.assert_close(mean(of, x_T, v_T), expected_T)
    torch.testing.assert_close(of.noise_std_S, noise_level * (-schedule.dt_T).sqrt())


@pytest.mark.parametrize("schedule_of", [schedules.sd3, schedules.flux, schedules.qwen])
def test_dance_steps_converge_to_the_data(schedule_of: Callable[[int], Schedule]) -> None:
    errors = [
        abs(variance(schedule_of(steps), "dance", 0.3, steps=steps) - VARIANCE)
        for steps in (20, 80, 320)
    ]
    assert all(fine < coarse / 2 for coarse, fine in pairwise(errors))


@law
@given(schedule=any_schedule, noise_level=noise_of_any_kind)
def test_cps_steps_keep_the_shares_of_image_and_noise_that_the_schedule_asks_for(
    schedule: Schedule, noise_level: float
) -> None:
    t, to, of = (
        schedule.sigmas[:-1],
        schedule.sigmas[1:],
        sde.transitions("cps", schedule, noise_level),
    )
    image_share = mean(of, 1 - t, torch.full_like(t, -1.0))  # image 1, noise 0
    noise_share = mean(of, t, torch.ones_like(t))  # image 0, noise 1
    torch.testing.assert_close(image_share, 1 - to)
    torch.testing.assert_close(noise_share**2 + of.noise_std_S**2, to**2)
    torch.testing.assert_close(of.noise_std_S, to * math.sin(noise_level * math.pi / 2))
    assert (noise_share >= 0).all()


@pytest.mark.parametrize(
    ("steps", "expected"), [(10, 0.09466), (40, 0.13739), (160, 0.15347), (1000, 0.16069)]
)
def test_cps_steps_do_not_have_the_marginals_of_the_flow(steps: int, expected: float) -> None:
    found = variance(schedules.sd3(steps), "cps", 0.8, steps=steps)
    assert found == pytest.approx(expected, abs=2e-5)


def test_variance_after_the_first_cps_step_is_that_of_the_deterministic_one() -> None:
    assert variance(schedules.sd3(10), "cps", 0.8, steps=1) == pytest.approx(0.92185, abs=1e-5)


@law
@given(schedule=any_schedule, kind=any_kind)
def test_without_noise_every_kind_is_the_deterministic_step(schedule: Schedule, kind: str) -> None:
    x_T = torch.linspace(-2, 2, schedule.steps, dtype=torch.float64)
    found_T = mean(sde.transitions(kind, schedule, 1e-5), x_T, x_T.cos())
    torch.testing.assert_close(found_T, x_T + schedule.dt_T * x_T.cos(), rtol=0, atol=1e-6)


@law
@given(schedule=any_schedule, kind=any_kind, noise_level=noise_of_any_kind, data=st.data())
def test_a_merged_step_is_that_of_the_schedule_without_the_levels_between(
    schedule: Schedule, kind: str, noise_level: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, schedule.steps - 1))
    landing = data.draw(st.integers(step + 1, schedule.steps))
    coarse = Schedule(torch.cat([schedule.sigmas[: step + 1], schedule.sigmas[landing:]]))
    merged = sde.transitions(kind, schedule, noise_level, [step], [landing])
    plain = sde.transitions(kind, coarse, noise_level, [step])
    for name, value in vars(merged).items():
        torch.testing.assert_close(value, vars(plain)[name], rtol=1e-12, atol=0)


@law
@given(schedule=any_schedule, noise_level=noise_of_any_kind, data=st.data())
def test_a_longer_jump_of_an_sde_adds_more_noise(
    schedule: Schedule, noise_level: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(1, schedule.steps - 1))
    landings = list(range(step + 1, schedule.steps + 1))
    for kind in ("flow", "dance"):
        of = sde.transitions(kind, schedule, noise_level, [step] * len(landings), landings)
        assert (of.noise_std_S.diff() > 0).all()


@law
@given(
    schedule=any_schedule, kind=st.sampled_from(["flow", "dance"]), noise_level=noise_of_any_kind
)
def test_expected_log_probability_of_a_fresh_draw(
    schedule: Schedule, kind: str, noise_level: float
) -> None:
    eta_T = sde.transitions(kind, schedule, noise_level).noise_std_S
    noise = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)  # of mean square one
    draw = eta_T.float().view(-1, 1, 1, 1) * noise
    found_T = sde.log_prob(draw, torch.zeros_like(draw), eta_T)
    expected_T = -0.5 - eta_T.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(found_T.double(), expected_T, rtol=1e-4, atol=1e-4)


def test_log_probability_of_cps_is_the_distance_alone() -> None:
    mean_B = torch.randn(3, 2, 4, 4, requires_grad=True)
    draw_B = mean_B.detach() + torch.randn(3, 2, 4, 4)
    for std in (0.01, 5.0):
        found_B = sde.distance_log_prob(draw_B, mean_B, torch.full((3,), std))
        expected_B = -((draw_B - mean_B) ** 2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(found_B, expected_B)
    found_B.sum().backward()
    assert mean_B.grad is not None
    torch.testing.assert_close(mean_B.grad, 2 * (draw_B - mean_B.detach()) / 32)


@pytest.mark.parametrize("log_prob", [sde.log_prob, sde.distance_log_prob])
def test_no_gradient_goes_through_a_draw(log_prob: Callable[..., Tensor]) -> None:
    draw = torch.randn(1, 2, 3, 3, requires_grad=True)
    mean_B = torch.zeros(1, 2, 3, 3, requires_grad=True)
    log_prob(draw, mean_B, torch.ones(1)).sum().backward()
    assert draw.grad is None
    assert mean_B.grad is not None


def guarded_slope(schedule: Schedule, noise_level: float) -> Tensor:
    """d(guarded log ratio) / d(velocity) per unit of noise and dimension, of every step.

    Mean and log-probability are typed again in float64: those of the product, which other tests
    hold, are float32 and would not carry a slope to nine digits.
    """
    of, dims = sde.transitions("flow", schedule, noise_level), 8
    velocity = torch.zeros(schedule.steps, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    per_row = (-1, 1, 1, 1)
    moved = of.v_factor_S.view(per_row) * velocity
    noise = torch.ones(1, 2, 4, dtype=torch.float64)
    draw = of.noise_std_S.view(per_row) * noise
    eta = of.noise_std_S.view(per_row)
    log_prob = (-((draw - moved) ** 2) / (2 * eta**2)).mean(dim=(1, 2, 3))[:, None]
    log_ratio = log_prob - log_prob.detach()
    found = loss.guarded_log_ratio_BK(log_ratio, moved, moved.detach(), of.noise_std_S)
    found.sum().backward()
    assert velocity.grad is not None
    slope_T: Tensor = velocity.grad[:, 0, 0, 0] * dims
    return slope_T


@law
@given(schedule=any_schedule, noise_level=noise_of_any_kind)
def test_with_guard_the_gradient_is_of_one_size_at_all_steps_but_the_first(
    schedule: Schedule, noise_level: float
) -> None:
    steps = sde.transitions("flow", schedule, noise_level)
    scale_T = (guarded_slope(schedule, noise_level) * weighting.raw_S("guard", steps)).abs()
    assert float(scale_T[0]) == pytest.approx(1.0, rel=1e-9)
    expected_T = torch.full_like(scale_T[1:], 1 + noise_level**2 / 2)
    torch.testing.assert_close(scale_T[1:], expected_T, rtol=1e-9, atol=0)


@law
@given(
    eta=st.floats(0.01, 2),
    size=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_guarded_log_ratio_is_the_noise_times_the_shift_of_the_mean(
    eta: float, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, shift, noise = (
        torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    shift = size * shift
    draw, std_B = old + eta * noise, torch.tensor([eta], dtype=torch.float64)

    def log_prob(mean: Tensor) -> Tensor:
        found: Tensor = torch.distributions.Normal(mean, eta).log_prob(draw)
        return found.mean(dim=(1, 2, 3))[:, None]

    log_ratio = log_prob(old + shift) - log_prob(old)
    found = loss.guarded_log_ratio_BK(log_ratio, old + shift, old, std_B)
    assert float(found) == pytest.approx(float((noise * shift).mean()), abs=1e-9)


@three_families
def test_guard_weights_are_one_over_dt_and_average_to_one(schedule: Schedule) -> None:
    trained = sde.transitions("flow", schedule, 0.7, range(schedule.steps - 1))
    weights_S = weighting.weights_S("guard", trained)
    assert float(weights_S.mean()) == pytest.approx(1.0)
    torch.testing.assert_close(
        weights_S * trained.dt_S, torch.full_like(weights_S, float(weights_S[0] * trained.dt_S[0]))
    )


@three_families
def test_forms_of_the_divergence(schedule: Schedule) -> None:
    of = sde.transitions("flow", schedule, 0.7, range(schedule.steps - 1))
    generator = torch.Generator().manual_seed(0)
    v, other = (torch.randn(len(of.dt_S), 2, 3, 3, generator=generator) for _ in range(2))
    now, before = (
        sde.step_mean(
            torch.zeros_like(v), velocity, x_factor_B=of.x_factor_S, v_factor_B=of.v_factor_S
        )
        for velocity in (v, other)
    )
    exact_S = loss.kl_B(now, before, of.noise_std_S)
    no_dt_S = loss.kl_without_dt_B(now, before, of.noise_std_S, of.dt_S)
    torch.testing.assert_close(no_dt_S, exact_S * of.dt_S.abs().float(), rtol=1e-5, atol=0)
    diffusion_S = of.noise_std_S / of.dt_S.abs().sqrt()
    squared_S = (now - before).square().mean(dim=(1, 2, 3)).double()
    torch.testing.assert_close(
        no_dt_S.double(), squared_S / (2 * diffusion_S**2), rtol=1e-5, atol=0
    )
    distance_S = loss.velocity_distance_B(v, other)
    torch.testing.assert_close(distance_S, (v - other).square().mean(dim=(1, 2, 3)))
    coefficient_S = of.v_factor_S**2 / (2 * of.noise_std_S**2)
    torch.testing.assert_close(
        exact_S.double(), coefficient_S * distance_S.double(), rtol=1e-4, atol=0
    )


@three_families
def test_noise_aware_weights_of_all_families(schedule: Schedule) -> None:
    """They sum to the number of trained steps and leave a gradient proportional to |dt|."""
    trained = sde.transitions("flow", schedule, 0.7, range(schedule.steps - 1))
    weights_S = weighting.weights_S("noise-aware", trained)
    assert float(weights_S.sum()) == pytest.approx(schedule.steps - 1)
    gradient_S = weights_S * trained.v_factor_S.abs() / trained.noise_std_S
    per_dt_S = gradient_S / trained.dt_S.abs()
    torch.testing.assert_close(per_dt_S[1:], per_dt_S[1:2].expand(len(per_dt_S) - 1))
    assert float(per_dt_S[1] / per_dt_S[0]) == pytest.approx(1 + 0.7**2 / 2)
