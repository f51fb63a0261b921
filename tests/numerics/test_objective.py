"""The loss and its gradient: shared forwards, first updates, clipping, the reference."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempflow_trainer import loop
from tempflow_trainer.algorithm import loss
from tempflow_trainer.algorithm.advantages import AdvantageRule, advantages_GSK
from tempflow_trainer.algorithm.branching import plan
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.algorithm.weighting import weights_S
from tempflow_trainer.experience import Experience, Objective, of_rollouts
from tempflow_trainer.models.tuning import FullTuning, Tuning
from tempflow_trainer.rollout import Walker
from tests.numerics import schedules
from tests.numerics.schedules import any_family, every_family, law
from tests.numerics.test_rollout import collect, noise_of
from tests.numerics.toys import Gaussian, Mlp, gradient, run_of, spec_of, still, walker_of

GROUPS = 3
PROMPTS = [f"prompt {i}" for i in range(GROUPS)]


Family = Callable[[int], Schedule]


def learned(
    *, draws: int = 4, steps: int = 6, family: Family = schedules.sd3
) -> tuple[Experience, Walker, Tuning]:
    """Transitions of a few groups with random advantages."""
    model = Mlp(schedule_of=family)
    walker, tuning = walker_of(model, steps), FullTuning(model, keep_reference=True)
    paper = plan(method="tempflow", total_steps=steps, branch_steps=[], draws=draws)
    rollouts = collect(walker, paper, GROUPS)
    advantages = torch.randn(
        GROUPS, len(paper.steps), draws, generator=torch.Generator().manual_seed(3)
    )
    weights = weights_S("noise-aware", walker.transitions(paper))
    return of_rollouts(rollouts, advantages, paper, walker, weights), walker, tuning


def gradient_of(
    objective: Objective, experience: Experience, walker: Walker, tuning: Tuning, rows: int = 1000
) -> tuple[Tensor, dict[str, float]]:
    """Gradient of the mean loss, and the sums that came with it."""
    conditioning = walker.policy.model.encode(PROMPTS)
    parameters = list(tuning.parameters().values())
    for parameter in parameters:
        parameter.grad = None
    sums: dict[str, float] = {}
    for batch in experience.micro_batches(rows):
        found = objective.loss_sums(batch, walker.policy, conditioning, tuning)
        total = found["policy"] + objective.kl_coefficient * found["kl"]
        (total / len(experience)).backward()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), sums


def one_row_a_draw(experience: Experience) -> Experience:
    """The published form: the state repeated for each of its draws."""
    draws = experience.draws_BKCHW.shape[1]
    repeated = experience.rows(torch.arange(len(experience)).repeat_interleave(draws))
    index_B = torch.arange(draws).repeat(len(experience))
    rows_B = torch.arange(len(repeated))
    return replace(
        repeated,
        draws_BKCHW=repeated.draws_BKCHW[rows_B, index_B][:, None],
        advantages_BK=repeated.advantages_BK[rows_B, index_B][:, None],
    )


@law
@given(
    draws=st.integers(1, 5),
    kl=st.sampled_from([0.0, 0.5]),
    rows=st.integers(1, 20),
    family=any_family,
)
def test_one_forward_for_all_draws_has_the_gradient_of_one_forward_each(
    draws: int, kl: float, rows: int, family: Family
) -> None:
    experience, walker, tuning = learned(draws=draws, family=family)
    objective = Objective(clip_range=1e-4, kl_coefficient=kl)
    with torch.no_grad():  # away from the reference, so that the divergence has a gradient
        for parameter in tuning.parameters().values():
            parameter.add_(0.01)
    shared, _ = gradient_of(objective, experience, walker, tuning, rows)
    assert walker.policy.evaluations["training"] == len(experience)
    repeated, _ = gradient_of(objective, one_row_a_draw(experience), walker, tuning)
    assert walker.policy.evaluations["training"] == (1 + draws) * len(experience)
    assert shared.norm() > 0
    torch.testing.assert_close(shared, repeated, rtol=1e-4, atol=1e-6 * float(shared.norm()))


@every_family
def test_it_is_the_gradient_of_a_rollout_that_keeps_its_graphs(family: Family) -> None:
    """ "Retain" of LeanGRPO (arXiv 2609.03528): the trunk's own forward at a step is kept until the
    rewards of its draws are known. No second forward and no ratio are in it."""
    experience, walker, tuning = learned(family=family)
    objective = Objective(clip_range=1e-4, kl_coefficient=0.0)
    shared, _ = gradient_of(objective, experience, walker, tuning)
    schedule, jumps = (
        walker.schedule,
        walker.transitions(plan(method="tempflow", total_steps=6, branch_steps=[], draws=4)),
    )
    by_step = [experience.rows(torch.arange(k, len(experience), 5)) for k in range(5)]
    conditioning = walker.policy.model.encode(PROMPTS)
    trunk, score = by_step[0].states_BCHW, torch.zeros(())
    for k, rows in enumerate(by_step):
        sigma_B = schedule.sigmas[k].float().expand(GROUPS)
        velocity = walker.policy.velocity(trunk, sigma_B, conditioning, purpose="rollout")
        mean = float(jumps.x_factor_S[k]) * trunk + float(jumps.v_factor_S[k]) * velocity
        std = float(jumps.noise_std_S[k])
        away_BK = ((rows.draws_BKCHW - mean[:, None]) / std).square().flatten(2).mean(dim=2)
        score = score + (rows.weight_B[:, None] * rows.advantages_BK * away_BK / 2).sum()
        trunk = trunk + float(schedule.dt_T[k]) * velocity.detach()
    parameters = list(tuning.parameters().values())
    found = torch.autograd.grad(score / (len(experience) * 4), parameters, allow_unused=True)
    kept = torch.cat([part.flatten() for part in found if part is not None])
    torch.testing.assert_close(kept, shared, rtol=1e-4, atol=1e-6 * float(shared.norm()))


@every_family
def test_before_the_first_update_the_ratio_is_one_and_the_loss_the_mean_advantage(
    family: Family,
) -> None:
    experience, walker, tuning = learned(family=family)
    objective = Objective(clip_range=1e-4, kl_coefficient=0.0)
    _, sums = gradient_of(objective, experience, walker, tuning)
    expected = -(experience.weight_B[:, None] * experience.advantages_BK).mean(dim=1).sum()
    assert sums["policy"] == pytest.approx(float(expected), rel=1e-5)
    assert (sums["clipped"], sums["drift"], sums["kl"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("rows", "family"),
    [
        (1, schedules.sd3),
        (4, schedules.flux),
        (5, schedules.qwen),
        (7, schedules.flux),
        (64, schedules.sd3),
    ],
)
def test_the_first_of_several_updates_has_a_ratio_of_one_bit_for_bit(
    rows: int, family: Family
) -> None:
    """Old log-probabilities come from the forward that training uses: same rows, same calls."""
    spec = spec_of(
        {
            "algorithm.updatesPerEpoch": 2,
            "algorithm.promptsPerEpoch": 2,
            "algorithm.seedsPerPrompt": 3,
            "compute.rowsPerTrainingCall": rows,
        }
    )
    run = still(run_of(spec, Mlp((3, 8, 8), family)))
    metrics = loop.run_epoch(run, 0)
    # The weights did not move, so this holds for the second update too.
    assert metrics["ratioDrift"] == 0.0
    assert metrics["ratioClippedShare"] == 0.0


def test_after_a_large_step_ratios_are_clipped() -> None:
    experience, walker, tuning = learned()
    objective = Objective(clip_range=1e-4, kl_coefficient=0.0)
    conditioning = walker.policy.model.encode(PROMPTS)
    experience = objective.with_old_log_probs(experience, walker.policy, conditioning, 1000)
    with torch.no_grad():
        for parameter in tuning.parameters().values():
            parameter.add_(0.1)
    _, sums = gradient_of(objective, experience, walker, tuning)
    assert sums["clipped"] > 0.5 * len(experience)
    assert sums["drift"] > 0


@law
@given(
    log_ratio=st.floats(-1, 1),
    advantage=st.floats(-5, 5),
    weight=st.floats(0.1, 3),
    clip=st.floats(1e-5, 0.5),
)
def test_the_surrogate_is_the_pessimistic_of_the_two_gains(
    log_ratio: float, advantage: float, weight: float, clip: float
) -> None:
    new = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    found = loss.surrogate_BK(
        new,
        torch.tensor([[advantage]], dtype=torch.float64),
        weight_B=torch.tensor([weight]),
        clip_range=clip,
    )
    ratio = float(new.detach().exp())
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    assert float(found.detach()) == pytest.approx(
        max(-weight * ratio * advantage, -weight * clipped * advantage), rel=1e-5, abs=1e-12
    )
    (slope,) = torch.autograd.grad(found.sum(), new)
    gains_more = advantage > 0 and ratio > 1 + clip
    loses_more = advantage < 0 and ratio < 1 - clip
    if gains_more or loses_more:
        assert float(slope) == 0.0
    share = loss.clipped_share_BK(new.detach(), clip)
    assert float(share) == float(abs(ratio - 1) > clip)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.01])
def test_the_gradient_does_not_depend_on_the_rows_of_a_call(kl_coefficient: float) -> None:
    found = []
    for rows in (3, 64):
        changes: dict[str, object] = {
            "compute.rowsPerTrainingCall": rows,
            "algorithm.klCoefficient": kl_coefficient,
        }
        run = still(run_of(spec_of(changes)))
        loop.run_epoch(run, 0)
        found.append(gradient(run))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6 * float(found[0].norm()))


def test_divergence_is_from_the_model_before_training_and_pulls_back_to_it() -> None:
    experience, walker, tuning = learned()
    start = torch.cat([p.detach().flatten() for p in tuning.parameters().values()])
    silent = replace(experience, advantages_BK=torch.zeros_like(experience.advantages_BK))
    objective = Objective(clip_range=1e-4, kl_coefficient=1.0)
    _, at_start = gradient_of(objective, silent, walker, tuning)
    assert at_start["kl"] == 0.0
    with torch.no_grad():
        for parameter in tuning.parameters().values():
            parameter.add_(0.01)
    pull, moved = gradient_of(objective, silent, walker, tuning)
    away = torch.cat([p.detach().flatten() for p in tuning.parameters().values()]) - start
    assert moved["kl"] > 0
    assert torch.dot(pull, away) > 0
    assert walker.policy.evaluations["reference"] == 2 * len(experience)


@every_family
@pytest.mark.parametrize("step", [0, 3, 7])
def test_noise_times_advantage_points_along_a_linear_reward(step: int, family: Family) -> None:
    """The direction of the update at one step tends to that of the reward as draws grow: the step,
    the tail to the image and the reward are all linear, and the tail of the Gaussian toy scales
    every dimension alike."""
    shape = (1, 4, 4)
    walker = walker_of(Gaussian(family, shape))
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rule = AdvantageRule(scope="seed", deviation="group", epsilon=1e-4, clip_max=5.0)
    cosines = []
    for draws in (8, 4096):
        one = plan(method="tempflow", total_steps=10, branch_steps=[step], draws=draws)
        noise = noise_of(one, 1, shape)
        rollouts = collect(walker, one, 1, noise)
        rewards = rollouts.rewards_GSK((rollouts.latents_NCHW * direction).sum(dim=(1, 2, 3)))
        advantages = advantages_GSK(rewards, torch.tensor([0]), rule)
        estimate = (noise(step) * advantages[:, 0, :, None, None, None]).mean(dim=(0, 1))
        cosines.append(
            float(torch.cosine_similarity(estimate.flatten(), direction.flatten(), dim=0))
        )
    assert cosines[1] > 0.98
    assert cosines[1] > cosines[0]
