"""Branch sets and windows by epoch, merged steps, and what a plan of any kind costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempflow_api.v1alpha1 import Algorithm, BranchSet, Sampling
from tempflow_trainer import seeds
from tempflow_trainer.algorithm import sde
from tempflow_trainer.algorithm.branching import BranchPlan, Tail
from tempflow_trainer.algorithm.exploration import Exploration
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.rollout import Walker
from tests.numerics import schedules
from tests.numerics.schedules import any_schedule, law
from tests.numerics.test_rollout import collect
from tests.numerics.toys import Mlp, walker_of


def exploration(
    algorithm: Algorithm | None = None,
    *,
    schedule: Schedule | None = None,
    sampling: Sampling | None = None,
    **chosen: object,
) -> Exploration:
    algorithm = algorithm or Algorithm()
    if chosen:
        chosen_set = BranchSet.model_validate(chosen)
        algorithm = algorithm.model_copy(update={"branch_set": chosen_set})
    return Exploration(algorithm, sampling or Sampling(), schedule or schedules.sd3(10))


def steps_of(found: Exploration, epochs: int) -> list[tuple[int, ...]]:
    return [found.plan(epoch).steps for epoch in range(epochs)]


def test_by_default_every_epoch_branches_at_all_steps_but_the_last() -> None:
    assert set(steps_of(exploration(), 5)) == {tuple(range(9))}


def test_the_first_steps_are_the_first_of_the_candidates() -> None:
    assert steps_of(exploration(choose="first", count=3), 2) == [(0, 1, 2)] * 2
    some = Algorithm(branch_steps=[7, 2, 5])
    assert steps_of(exploration(some, choose="first", count=2), 1) == [(2, 5)]


def test_a_sliding_window_moves_from_noise_to_image_and_stays_there() -> None:
    found = steps_of(exploration(choose="sliding", count=4, every_epochs=2), 20)
    assert found[:5] == [(0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4, 5)]
    assert set(found[10:]) == {(5, 6, 7, 8)}


@pytest.mark.parametrize("choose", ["random", "window"])
def test_chance_is_named_by_seed_and_epoch(choose: str) -> None:
    one = steps_of(exploration(choose=choose, count=2), 200)
    assert one == steps_of(exploration(choose=choose, count=2), 200)
    other = exploration(Algorithm(seed=1), choose=choose, count=2)
    assert one != steps_of(other, 200)
    counts = torch.zeros(9)
    for steps in one:
        assert len(steps) == 2
        assert choose == "random" or steps[1] == steps[0] + 1
        counts[list(steps)] += 1
    # Two of nine steps, 200 times; the ends of a window are met half as often.
    expected = torch.full((9,), 400 / 9)
    if choose == "window":
        expected = torch.tensor([25.0, *[50.0] * 7, 25.0])
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()


@law
@given(
    schedule=any_schedule.filter(lambda found: found.steps > 3),
    choose=st.sampled_from(["all", "first", "random", "window", "sliding"]),
    weighting=st.sampled_from(["none", "noise-aware", "guard"]),
    method=st.sampled_from(["tempflow", "flow-grpo"]),
    kind=st.sampled_from(["flow", "dance"]),
    epoch=st.integers(0, 1000),
)
def test_weights_average_to_one_over_the_steps_of_the_epoch(
    schedule: Schedule, choose: str, weighting: str, method: str, kind: str, epoch: int
) -> None:
    algorithm = Algorithm.model_validate({"method": method, "weighting": weighting})
    sampling = Sampling.model_validate({"sde": kind, "steps": schedule.steps})
    found = exploration(algorithm, schedule=schedule, sampling=sampling, choose=choose, count=2)
    plan = found.plan(epoch)
    weights_S = found.weights_S(plan)
    assert len(weights_S) == len(plan.steps)
    assert float(weights_S.mean()) == pytest.approx(1.0)
    assert plan.images_per_group == found.plan(epoch + 1).images_per_group
    assert plan.steps[-1] < schedule.steps - 1


@law
@given(
    schedule=any_schedule.filter(lambda found: found.steps > 3),
    share=st.floats(0.05, 0.95),
    method=st.sampled_from(["tempflow", "flow-grpo"]),
    kind=st.sampled_from(["flow", "dance"]),
)
def test_merged_steps_are_as_short_as_their_noise_allows(
    schedule: Schedule, share: float, method: str, kind: str
) -> None:
    algorithm = Algorithm.model_validate({"method": method, "mergeBelow": share * 0.7})
    sampling = Sampling.model_validate({"sde": kind, "steps": schedule.steps})
    found = exploration(algorithm, schedule=schedule, sampling=sampling)
    plan, last = found.plan(0), schedule.steps - 1
    noise_S = found.transitions(plan).noise_std_S
    shorter = [
        max(step + 1, landing - 1) for step, landing in zip(plan.steps, plan.landings, strict=True)
    ]
    less_S = sde.transitions(kind, schedule, 0.7, plan.steps, shorter).noise_std_S
    for s, landing in enumerate(plan.landings):
        assert landing <= last
        assert landing == last or noise_S[s] >= share * 0.7
        assert landing == plan.steps[s] + 1 or less_S[s] < share * 0.7
    one = found.trajectory(0)
    assert all(a <= b for a, b in zip(one.landings, one.steps[1:], strict=False))
    assert (one.draws, one.images_per_group, one.steps[0]) == (1, 1, plan.steps[0])
    if method == "flow-grpo":
        assert one.steps == plan.steps


@st.composite
def any_plan(draw: st.DrawFn) -> BranchPlan:
    total = draw(st.integers(2, 9))
    steps, landings, at = [], [], 0
    for step in sorted(draw(st.sets(st.integers(0, total - 2), min_size=1))):
        if step >= at:
            steps.append(step)
            at = draw(st.integers(step + 1, total))
            landings.append(at)
    return BranchPlan(
        total,
        tuple(steps),
        draw(st.integers(1, 3)),
        trunk_follows_draw=draw(st.booleans()),
        landings=tuple(landings),
        tail=Tail(draw(st.sampled_from(["euler", "dpm2"])), draw(st.integers(1, 9))),
    )


@law
@given(plan=any_plan(), groups=st.integers(1, 3))
def test_what_a_plan_costs_is_what_its_rollout_does(plan: BranchPlan, groups: int) -> None:
    walker: Walker = walker_of(Mlp(), plan.total_steps)
    found = collect(walker, plan, groups)
    assert walker.policy.evaluations["rollout"] == groups * plan.rollout_evaluations
    assert len(found.latents_NCHW) == groups * plan.images_per_group
    states = found.states_GSRCHW.shape
    assert states[0] * states[1] * states[2] == groups * plan.rows_per_group
    assert found.draws_GSKCHW.shape[:3] == (groups, len(plan.steps), plan.draws)
    rewards = found.rewards_GSK(torch.arange(len(found.latents_NCHW)))
    assert set(rewards.flatten().tolist()) == set(range(len(found.latents_NCHW)))


def test_draws_of_a_window_share_what_comes_before_it() -> None:
    walker = walker_of(Mlp(), 6)
    window = BranchPlan(6, (2, 3), 3, trunk_follows_draw=True)
    found = collect(walker, window, groups=2)
    first, second = found.states_GSRCHW.unbind(dim=1)
    assert torch.equal(first[:, :1].expand_as(first), first)
    assert torch.equal(second, found.draws_GSKCHW[:, 0])
    images = found.latents_NCHW.unflatten(0, (2, 3))
    assert (images.std(dim=1) > 0).all()
    # 3 of the trunk, then 3 draws each at 3, 4 and 5.
    assert window.rollout_evaluations == 3 + 3 * 3


def test_noise_of_a_window_moves_only_what_comes_after() -> None:
    walker, window = walker_of(Mlp(), 6), BranchPlan(6, (2, 3), 3, trunk_follows_draw=True)
    shape = (2, 3, 3, 2, 2)

    def collected(changed: int | None) -> torch.Tensor:
        return collect(
            walker, window, 2, lambda k: seeds.normal(shape, int(k == changed), k)
        ).states_GSRCHW

    plain = collected(None)
    assert torch.equal(plain, collected(3))
    assert not torch.equal(plain[:, 1], collected(2)[:, 1])
