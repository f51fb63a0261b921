"""The lock-step rollout: as if one branch was finished after the other, and what a draw moves."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempflow_trainer import seeds
from tempflow_trainer.algorithm import sde
from tempflow_trainer.algorithm.advantages import AdvantageRule, advantages_GSK
from tempflow_trainer.algorithm.branching import BranchPlan, plan
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.models.base import Conditioning, Policy
from tempflow_trainer.rollout import Rollouts, Walker
from tests.numerics.schedules import (
    any_family,
    any_noise_level,
    any_schedule,
    every_family,
    law,
)
from tests.numerics.toys import CPU, Gaussian, Mlp, Toy, gaussian_velocity, walker_of

A = 0.7
Noise = Callable[[int], Tensor]
Family = Callable[[int], Schedule]


def noise_of(plan: BranchPlan, groups: int, shape: tuple[int, int, int], seed: int = 0) -> Noise:
    return lambda step: seeds.normal((groups, plan.draws, *shape), seed, "branch", step)


def starts_of(groups: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return seeds.normal((groups, *shape), seed, "start")


def collect(walker: Walker, plan: BranchPlan, groups: int, noise: Noise | None = None) -> Rollouts:
    model = walker.policy.model
    shape = model.latent_shape(0, 0)
    conditioning = model.encode([f"prompt {i}" for i in range(groups)])
    return walker.collect(
        plan, starts_of(groups, shape), conditioning, noise or noise_of(plan, groups, shape)
    )


@torch.no_grad()
def one_after_the_other(
    policy: Policy, sigmas: list[float], plan: BranchPlan, groups: int, noise: Noise
) -> tuple[Tensor, Tensor, Tensor]:
    """States [G, S, ...], draws [G, S, K, ...] and final latents in the order of the draws."""
    model, final = policy.model, []
    states, draws = [], []
    for g in range(groups):
        conditioning = model.encode([f"prompt {g}"])

        def velocity(x: Tensor, k: int, text: Conditioning = conditioning) -> Tensor:
            sigma = torch.tensor([sigmas[k]])
            return policy.velocity(x[None], sigma, text, purpose="rollout")[0]

        x = starts_of(groups, model.latent_shape(0, 0))[g]
        for k in range(plan.steps[-1] + 1):
            t, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
            v = velocity(x, k)
            if k in plan.steps:
                states.append(x)
                g2 = A**2 * t / (1 - (sigmas[1] if k == 0 else t))
                mean = x * (1 + g2 * dt / (2 * t)) + v * dt * (1 + g2 * (1 - t) / (2 * t))
                for b in range(plan.draws):
                    y = mean + (g2 * -dt) ** 0.5 * noise(k)[g, b]
                    draws.append(y)
                    for j in range(k + 1, plan.total_steps):
                        y = y + (sigmas[j + 1] - sigmas[j]) * velocity(y, j)
                    final.append(y)
            x = x + dt * v
    per_group = (groups, len(plan.steps))
    return (
        torch.stack(states).unflatten(0, per_group),
        torch.stack(draws).unflatten(0, (*per_group, plan.draws)),
        torch.stack(final),
    )


@st.composite
def plans(draw: st.DrawFn) -> BranchPlan:
    total = draw(st.integers(2, 7))
    # The last step is left to its own test: its likelihood overflows.
    steps = draw(st.sets(st.integers(0, total - 2), min_size=1))
    return plan(
        method="tempflow",
        total_steps=total,
        branch_steps=sorted(steps),
        draws=draw(st.integers(1, 3)),
    )


@law
@given(
    plan=plans(),
    groups=st.integers(1, 3),
    family=any_family,
    rows_per_call=st.integers(1, 40),
    guidance=st.sampled_from([1.0, 3.0]),
)
def test_lock_step_is_one_branch_after_the_other(
    plan: BranchPlan, groups: int, family: Family, rows_per_call: int, guidance: float
) -> None:
    model = Mlp(schedule_of=family, guided=True)
    policy = Policy.of(model, guidance_scale=guidance, negative_prompt="not this", device=CPU)
    schedule = model.schedule(plan.total_steps, 0, 0)
    walker = Walker(policy, schedule, A, rows_per_call)
    noise = noise_of(plan, groups, model.shape)
    found = collect(walker, plan, groups, noise)
    rows = groups * plan.rollout_evaluations
    assert policy.evaluations["rollout"] == rows * (1 if guidance == 1 else 2)
    states, draws, final = one_after_the_other(
        policy, schedule.sigmas.tolist(), plan, groups, noise
    )
    torch.testing.assert_close(found.states_GSRCHW[:, :, 0], states, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found.draws_GSKCHW, draws, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found.latents_NCHW, final, rtol=1e-5, atol=5e-6)
    assert policy.evaluations["rollout"] == 2 * rows * (1 if guidance == 1 else 2)


def test_evaluations_of_the_papers_plan_are_those_of_the_formula() -> None:
    walker = walker_of(Mlp())
    paper = plan(method="tempflow", total_steps=10, branch_steps=[], draws=6)
    found = collect(walker, paper, groups=4)
    assert walker.policy.evaluations["rollout"] == 4 * 279
    assert walker.policy.evaluations["training"] == 0
    assert len(found.latents_NCHW) == 4 * 54


@law
@given(plan=plans(), groups=st.integers(1, 3), family=any_family, data=st.data())
def test_noise_of_a_step_moves_the_images_of_that_step_alone(
    plan: BranchPlan, groups: int, family: Family, data: st.DataObject
) -> None:
    walker = walker_of(Mlp(schedule_of=family), plan.total_steps)
    shape = (3, 2, 2)
    changed = data.draw(st.sampled_from(plan.steps))
    plain, other = (noise_of(plan, groups, shape, seed) for seed in (0, 1))
    before = collect(walker, plan, groups, plain)
    after = collect(walker, plan, groups, lambda k: other(k) if k == changed else plain(k))
    # The trunk is the same to the last bit: no draw has a part in it.
    assert torch.equal(before.states_GSRCHW, after.states_GSRCHW)
    rewards = [
        found.rewards_GSK(found.latents_NCHW.mean(dim=(1, 2, 3))) for found in (before, after)
    ]
    place = plan.steps.index(changed)
    others = [s for s in range(len(plan.steps)) if s != place]
    assert torch.equal(rewards[0][:, others], rewards[1][:, others])
    assert (rewards[0][:, place] != rewards[1][:, place]).all()


def test_a_reward_is_credited_to_the_draw_whose_image_it_is() -> None:
    walker, groups = walker_of(Gaussian(shape=(1, 2, 2)), 4), 3
    paper = plan(method="tempflow", total_steps=4, branch_steps=[], draws=2)

    def noise(step: int) -> Tensor:
        """Zero but for one draw of one group at one step."""
        value = torch.zeros(groups, 2, 1, 2, 2)
        if step == 1:
            value[2, 0] = 1.0
        return value

    found = collect(walker, paper, groups, noise)
    rewards = found.rewards_GSK(found.latents_NCHW.mean(dim=(1, 2, 3)))
    silent = collect(walker, paper, groups, lambda _: torch.zeros(groups, 2, 1, 2, 2))
    differs = rewards != silent.rewards_GSK(silent.latents_NCHW.mean(dim=(1, 2, 3)))
    assert differs.nonzero().tolist() == [[2, 1, 0]]


@every_family
def test_the_trunk_is_the_deterministic_trajectory(family: Family) -> None:
    walker = walker_of(Mlp(schedule_of=family), 6)
    # A branch at the very last step keeps the trunk alive to its end.
    whole = BranchPlan(6, (0, 2, 5), 1, trunk_follows_draw=False)
    found = collect(walker, whole, groups=2)
    conditioning = walker.policy.model.encode(["prompt 0", "prompt 1"])
    starts = starts_of(2, (3, 2, 2))
    assert torch.equal(found.states_GSRCHW[:, 0, 0], starts)
    x = starts
    for k in range(5):
        sigma = walker.schedule.sigmas[k].float().expand(2)
        with torch.no_grad():
            v = walker.policy.velocity(x, sigma, conditioning, purpose="rollout")
        x = x + float(walker.schedule.dt_T[k]) * v
    torch.testing.assert_close(found.states_GSRCHW[:, 2, 0], x, rtol=1e-5, atol=1e-6)
    sampled = walker.sample(starts, conditioning)
    with torch.no_grad():
        sigma = walker.schedule.sigmas[5].float().expand(2)
        v = walker.policy.velocity(x, sigma, conditioning, purpose="rollout")
    torch.testing.assert_close(
        sampled, x + float(walker.schedule.dt_T[5]) * v, rtol=1e-5, atol=1e-6
    )


SPREAD = [
    0.26185,
    0.29200,
    0.22401,
    0.20135,
    0.19581,
    0.20215,
    0.22069,
    0.24848,
    0.22732,
    0.00628,
]


def test_spread_of_the_images_of_a_branch() -> None:
    walker = walker_of(Gaussian())
    every = BranchPlan(10, tuple(range(10)), 2, trunk_follows_draw=False)
    # All steps of the toy are affine, so one unit of noise shows the standard deviation.
    unit = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)
    found = collect(walker, every, 1, lambda _: unit)
    images_SK = found.latents_NCHW.view(10, 2)
    assert (images_SK[:, 1] - images_SK[:, 0]).tolist() == pytest.approx(SPREAD, abs=1e-5)


@law
@given(schedule=any_schedule, noise_level=any_noise_level)
def test_spread_of_a_branch_is_its_noise_times_the_slopes_of_the_steps_after(
    schedule: Schedule, noise_level: float
) -> None:
    t, dt, steps = schedule.sigmas[:-1], schedule.dt_T, schedule.steps
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    slope_T = 1 + dt * (gaussian_velocity(one, t) - gaussian_velocity(zero, t))
    after_T = torch.stack([slope_T[k + 1 :].prod() for k in range(steps)])
    eta_T = sde.noise_std_T(schedule, noise_level)
    walker = walker_of(Gaussian(lambda _: schedule), steps, noise_level=noise_level)
    every = BranchPlan(steps, tuple(range(steps)), 2, trunk_follows_draw=False)
    unit = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)
    images_SK = collect(walker, every, 1, lambda _: unit).latents_NCHW.view(steps, 2)
    found_T = images_SK[:, 1] - images_SK[:, 0]
    torch.testing.assert_close(found_T.double(), eta_T * after_T, rtol=1e-3, atol=1e-5)


@every_family
def test_a_branch_at_the_last_step_is_its_own_image(family: Family) -> None:
    walker = walker_of(Mlp(schedule_of=family))
    last = BranchPlan(10, (9,), 6, trunk_follows_draw=False)
    found = collect(walker, last, groups=2)
    assert torch.equal(found.latents_NCHW, found.draws_GSKCHW.flatten(0, 2))
    assert walker.policy.evaluations["rollout"] == 2 * 10
    rewards = found.rewards_GSK(found.latents_NCHW.mean(dim=(1, 2, 3)))
    # A mean over the latent: less than the noise of the step, 0.006 with SD3.
    assert rewards.std(dim=2, correction=0).max() < sde.noise_std_T(walker.schedule, A)[9]
    rule = AdvantageRule(scope="seed", deviation="group", epsilon=1e-4, clip_max=5.0)
    found_GSK = advantages_GSK(rewards, torch.tensor([0, 1]), rule)
    assert found_GSK.isfinite().all()
    assert found_GSK.abs().max() <= 5


def test_a_rollout_does_not_depend_on_the_rows_of_a_call() -> None:
    paper = plan(method="tempflow", total_steps=6, branch_steps=[], draws=3)
    toys: list[Toy] = [Mlp(), Gaussian(shape=(3, 2, 2))]
    for model in toys:
        large, small = (
            collect(walker_of(model, 6, rows_per_call=rows), paper, 3) for rows in (1000, 7)
        )
        torch.testing.assert_close(large.latents_NCHW, small.latents_NCHW, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_kept_of_a_rollout() -> None:
    found = collect(
        walker_of(Mlp(), 4), plan(method="tempflow", total_steps=4, branch_steps=[], draws=2), 1
    )
    assert not found.latents_NCHW.requires_grad
    assert not found.draws_GSKCHW.requires_grad
