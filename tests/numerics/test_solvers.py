"""Tails of second order and of fewer steps."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempflow_trainer.algorithm import solvers
from tempflow_trainer.algorithm.branching import Tail
from tempflow_trainer.algorithm.schedule import Schedule
from tests.numerics import schedules
from tests.numerics.schedules import any_schedule, law
from tests.numerics.toys import MEAN, gaussian_velocity, path_variance


def solve(x: Tensor, sigmas: list[float], velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    before = None
    for sigma, sigma_next in pairwise(sigmas):
        x, before = solvers.dpm2_step(
            x, velocity(x, sigma), sigma=sigma, sigma_next=sigma_next, before=before
        )
    return x


def curved(x: Tensor, sigma: float) -> Tensor:
    """A velocity of no particular model."""
    return (2 * x + 3 * sigma).sin() - x * sigma


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # inside diffusers
@law
@given(schedule=any_schedule.filter(lambda found: found.steps > 2), data=st.data())
def test_it_is_the_multistep_solver_of_diffusers(schedule: Schedule, data: st.DataObject) -> None:
    start = data.draw(st.integers(1, schedule.steps - 1))
    sigmas = schedule.sigmas[start:].tolist()
    theirs = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
    )
    theirs.set_timesteps(len(sigmas) - 1)
    theirs.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    x = expected = torch.linspace(-2, 2, 8, dtype=torch.float64).view(1, 2, 2, 2)
    for index, timestep in enumerate(theirs.timesteps):
        v = curved(expected, sigmas[index])
        expected = theirs.step(v, timestep, expected, return_dict=False)[0]
    found = solve(x, sigmas, curved)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_its_error_falls_with_the_square_of_the_step() -> None:
    """From noise 0.95 to 0.3 of the Gaussian toy, where the flow is known."""
    begin, end, x = 0.95, 0.3, torch.tensor([[[[1.3]]]])

    def spread(t: float) -> float:
        return math.sqrt(float(path_variance(torch.tensor(t, dtype=torch.float64))))

    exact = (1 - end) * MEAN + spread(end) / spread(begin) * (float(x) - (1 - begin) * MEAN)
    errors = []
    for steps in (8, 16, 32, 64):
        sigmas = torch.linspace(begin, end, steps + 1, dtype=torch.float64).tolist()
        found = solve(x, sigmas, lambda x, t: gaussian_velocity(x, torch.tensor(t)))
        errors.append(abs(float(found) - exact))
    assert all(fine < coarse / 3.5 for coarse, fine in pairwise(errors))


@law
@given(total=st.integers(1, 60), steps=st.integers(1, 80), data=st.data())
def test_a_tail_passes_evenly_spread_levels(total: int, steps: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, total))
    nodes = Tail("euler", steps).nodes(start, total)
    assert (nodes[0], nodes[-1]) == (start, total)
    assert len(nodes) - 1 == min(steps, total - start)
    gaps = {after - before for before, after in pairwise(nodes)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


@pytest.mark.parametrize("family", [schedules.sd3, schedules.flux, schedules.qwen])
def test_by_default_a_tail_passes_every_level(family: Callable[[int], Schedule]) -> None:
    steps = family(10).steps
    assert all(Tail().nodes(k, steps) == tuple(range(k, steps + 1)) for k in range(steps + 1))
