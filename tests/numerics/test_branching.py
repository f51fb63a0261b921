"""What a plan costs, and which plans there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow_trainer.algorithm.branching import BranchPlan, plan
from tests.numerics.schedules import law


def test_cost_of_the_papers_plan() -> None:
    found = plan(method="tempflow", total_steps=10, branch_steps=[], draws=6)
    assert found.steps == tuple(range(9))
    assert found.rollout_evaluations == 9 + 45 * 6
    assert found.images_per_group == 54


def test_cost_of_flow_grpo() -> None:
    found = plan(method="flow-grpo", total_steps=10, branch_steps=[], draws=1)
    assert found.rollout_evaluations == 10
    assert found.images_per_group == 1
    assert found.trunk_follows_draw


@law
@given(total=st.integers(2, 30), draws=st.integers(1, 8), data=st.data())
def test_cost_is_that_of_completing_every_branch(
    total: int, draws: int, data: st.DataObject
) -> None:
    steps = data.draw(st.sets(st.integers(0, total - 1), min_size=1))
    found = plan(method="tempflow", total_steps=total, branch_steps=list(steps), draws=draws)
    tails = [total - 1 - step for step in steps for _ in range(draws)]
    assert found.rollout_evaluations == max(steps) + 1 + sum(tails)
    assert found.images_per_group == len(tails)


@pytest.mark.parametrize(
    ("steps", "draws", "follows"),
    [((), 1, False), ((2, 1), 1, False), ((1, 1), 1, False), ((10,), 1, False), ((-1,), 1, False)],
    ids=["none", "falling", "twice", "beyond the end", "before the start"],
)
def test_steps_that_cannot_be_followed_are_refused(
    steps: tuple[int, ...], draws: int, follows: bool
) -> None:
    with pytest.raises(ValueError, match="branch steps"):
        BranchPlan(10, steps, draws, trunk_follows_draw=follows)


@pytest.mark.parametrize(
    ("landings", "follows"),
    [((3, 2), False), ((2, 11), False), ((4, 5), True)],
    ids=["backwards", "beyond the end", "over an own step"],
)
def test_jumps_that_cannot_be_followed_are_refused(
    landings: tuple[int, ...], follows: bool
) -> None:
    with pytest.raises(ValueError, match=r"cannot lead|jumps over"):
        BranchPlan(10, (1, 3), 2, trunk_follows_draw=follows, landings=landings)
