"""One epoch: updates, stops, and what is reported of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from tempflow_api.errors import Preempted, TrainingDiverged
from tempflow_trainer import loop
from tempflow_trainer.experience import Experience
from tempflow_trainer.loop import Run
from tempflow_trainer.rewards.base import Reward, Term
from tests.numerics.toys import FLOW_GRPO, Brightness, gradient, run_of, spec_of, still
from tests.unit.trainer.sessions import after


class Flat(Brightness):
    """The same for every image."""

    def score(
        self,
        images_N3HW: torch.Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> torch.Tensor:
        del prompts, metadata
        return torch.full((len(images_N3HW),), 2.0)


METRICS = {
    "reward",
    "rewardStd",
    "rewards",
    "missingScores",
    "groupsLeftOut",
    "advantageZeroShare",
    "loss",
    "kl",
    "ratioClippedShare",
    "ratioDrift",
    "gradNorm",
}


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in run.tuning.parameters().values()])


@pytest.mark.parametrize("changes", [{}, FLOW_GRPO], ids=["tempflow", "flow-grpo"])
@pytest.mark.parametrize("updates", [1, 2, 4])
def test_an_epoch_makes_its_updates_and_reports_finite_numbers(
    changes: dict[str, object], updates: int
) -> None:
    run = run_of(spec_of({**changes, "algorithm.updatesPerEpoch": updates}))
    before = weights(run)
    metrics = loop.run_epoch(run, 0)
    assert set(metrics) == METRICS
    assert run.updates_done == updates
    assert not torch.equal(weights(run), before)
    values = torch.tensor([v for v in metrics.values() if isinstance(v, float)])
    assert values.isfinite().all()
    assert metrics["rewards"] == {"brightness": pytest.approx(metrics["reward"], abs=1e-6)}
    drifts = metrics["ratioDrift"]
    assert isinstance(drifts, float)
    assert (drifts > 0) == (updates > 1)


@pytest.mark.parametrize("questions", [0, 1, 2])
def test_an_epoch_that_is_stopped_has_changed_nothing(questions: int) -> None:
    run = run_of(spec_of())
    before = weights(run)
    stopped = replace(run, stop_requested=after(questions))
    with pytest.raises(Preempted):
        loop.run_epoch(stopped, 0)
    assert torch.equal(weights(run), before)
    assert run.updates_done == 0
    fresh = run_of(spec_of())
    assert loop.run_epoch(run, 0) == loop.run_epoch(fresh, 0)
    assert torch.equal(weights(run), weights(fresh))


def test_epochs_differ_in_their_noise_and_can_be_repeated() -> None:
    run = still(run_of(spec_of()))
    first, second, again = (loop.run_epoch(run, epoch) for epoch in (0, 1, 0))
    assert first == again
    assert first["reward"] != second["reward"]


def test_the_seed_of_the_run_moves_all_noise() -> None:
    rewards = {
        loop.run_epoch(still(run_of(spec_of({"algorithm.seed": seed}))), 0)["reward"]
        for seed in range(4)
    }
    assert len(rewards) == 4


def test_groups_without_spread_are_counted() -> None:
    run = still(run_of(spec_of()))
    equal = replace(run, reward=Reward([Term("flat", 0.5, Flat())]))
    metrics = loop.run_epoch(equal, 0)
    assert metrics["advantageZeroShare"] == 1.0
    assert (metrics["reward"], metrics["rewardStd"]) == (1.0, 0.0)
    assert (metrics["loss"], metrics["gradNorm"]) == (0.0, 0.0)
    assert loop.run_epoch(run, 0)["advantageZeroShare"] == 0.0


def test_held_out_rewards_are_no_part_of_an_epoch() -> None:
    run = run_of(spec_of())
    terms = [Term("brightness", 1.0, Brightness()), Term("judge", 0.0, Flat())]
    metrics = loop.run_epoch(replace(run, reward=Reward(terms)), 0)
    assert metrics["rewards"] == {"brightness": pytest.approx(metrics["reward"], abs=1e-6)}


def test_gradients_are_cut_to_their_bound_and_reported_as_they_were() -> None:
    free = still(run_of(spec_of()))
    norm = loop.run_epoch(free, 0)["gradNorm"]
    assert isinstance(norm, float)
    assert float(gradient(free).norm()) == pytest.approx(norm, rel=1e-5)
    bound = replace(still(run_of(spec_of())), max_grad_norm=norm / 2)
    assert loop.run_epoch(bound, 0)["gradNorm"] == pytest.approx(norm, rel=1e-6)
    assert float(gradient(bound).norm()) == pytest.approx(norm / 2, rel=1e-4)


def test_no_step_is_taken_with_a_gradient_that_is_not_finite() -> None:
    run = run_of(spec_of())
    before = weights(run)
    with pytest.raises(TrainingDiverged, match=r"gradient norm is nan at update 1; lower"):
        loop.update(run, broken(run), run.policy.model.encode(["a one"]))
    assert torch.equal(weights(run), before)
    assert run.updates_done == 0


def broken(run: Run) -> Experience:
    """One row whose draw is infinitely far away."""
    shape = run.latent_shape
    value = torch.ones(1, dtype=torch.float64)
    return Experience(
        states_BCHW=torch.zeros(1, *shape),
        draws_BKCHW=torch.full((1, 2, *shape), torch.inf),
        advantages_BK=torch.tensor([[1.0, -1.0]]),
        group_B=torch.zeros(1, dtype=torch.long),
        sigma_B=value * 0.5,
        dt_B=value * -0.1,
        x_factor_B=value,
        v_factor_B=value,
        noise_std_B=value,
        weight_B=value,
        branch_B=torch.zeros(1, dtype=torch.long),
    )


def test_the_average_follows_the_updates_and_not_the_epochs() -> None:
    changes: dict[str, object] = {
        "algorithm.updatesPerEpoch": 2,
        "model.ema": {"decay": 0.9, "everyUpdates": 3},
    }
    run = run_of(spec_of(changes))
    start = {name: value.clone() for name, value in run.ema.values.items()}
    loop.run_epoch(run, 0)
    assert all(torch.equal(start[name], value) for name, value in run.ema.values.items())
    loop.run_epoch(run, 1)
    assert any(not torch.equal(start[name], value) for name, value in run.ema.values.items())


def test_prompts_are_read_once_each_however_often_they_are_drawn() -> None:
    """More prompts an epoch than there are: the same prompt in several places."""
    changes: dict[str, object] = {
        "data.prompts": ["a one", "a two"],
        "algorithm.promptsPerEpoch": 6,
        "algorithm.advantage": {"scope": "prompt"},
    }
    metrics = loop.run_epoch(run_of(spec_of(changes)), 0)
    assert metrics["advantageZeroShare"] == 0.0
