"""The guard: which epochs it alarms about, and what a run does then."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import (
    Preempted,
    StoreUnavailable,
    TrainingCollapsed,
    TrainingDiverged,
)
from tempflow_api.record import Evaluation, Metrics, Spread
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import Guard as Limits
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import checkpoint, loop
from tempflow_trainer.data import load_prompts
from tempflow_trainer.guard import Guard
from tempflow_trainer.main import build_run
from tempflow_trainer.models import families
from tempflow_trainer.rewards.base import Reward, Term
from tempflow_trainer.session import Session
from tempflow_trainer.store import FolderStore
from tests.numerics.toys import Brightness, spec_of
from tests.unit.trainer.family_cases import ALONE, CPU
from tests.unit.trainer.sessions import Rows, after, epochs, final_state, rows, session_of
from tests.unit.trainer.test_learning import text_of_example
from tests.unit.trainer.test_session import assert_same_run

TIME = "2026-01-31T12:00:00Z"


def metrics(epoch: int = 1, **changes: Any) -> Metrics:
    usual: dict[str, Any] = {
        "reward": 1.0,
        "reward_std": 0.5,
        "rewards": {},
        "advantage_zero_share": 0.1,
        "loss": 0.0,
        "kl": 0.0,
        "ratio_clipped_share": 0.1,
        "ratio_drift": 1e-4,
        "grad_norm": 0.2,
        "images": 8,
        "images_per_second": 1.0,
        "seconds": {},
        "evaluations": {},
    }
    return Metrics(epoch=epoch, time=TIME, **{**usual, **changes})


def evaluation(judge: float, std: float = 0.2) -> Evaluation:
    return Evaluation(
        epoch=0,
        time=TIME,
        reward=0.0,
        reward_std=0.0,
        rewards={"judge": Spread(mean=judge, std=std)},
        diversity=None,
        images=8,
        grid=None,
    )


def guard(**limits: Any) -> Guard:
    return Guard(Limits(**limits), 1e-3, ("judge",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio_drift": 0.011}, "mean |ratio - 1| is 0.011 (alarm above 0.01)"),
        ({"grad_norm": 2.1}, "gradient norm is 2.1, usually 0.2 (alarm above 2)"),
        ({"reward": -0.51}, "reward is -0.51, 1 at first (alarm below -0.5)"),
    ],
)
def test_one_bad_epoch(changes: dict[str, float], words: str) -> None:
    one = guard()
    assert [one.epoch(metrics(e)) for e in range(1, 6)] == [[]] * 5
    assert one.epoch(metrics(6, **changes)) == [words]
    assert one.epoch(metrics(7)) == []
    off = guard(ratio_drift=0, grad_norm=0, reward_drop=0)
    assert [off.epoch(metrics(e)) for e in range(1, 6)] == [[]] * 5
    assert off.epoch(metrics(6, **changes)) == []


@pytest.mark.parametrize("changes", [{"ratio_drift": 0.009}, {"grad_norm": 1.9}, {"reward": -0.49}])
def test_within_the_limits(changes: dict[str, float]) -> None:
    one = guard()
    assert [one.epoch(metrics(e)) for e in range(1, 6)] == [[]] * 5
    assert one.epoch(metrics(6, **changes)) == []


def test_no_spread_is_alarming_the_third_time_in_a_row() -> None:
    one = guard()
    found = [one.epoch(metrics(e, advantage_zero_share=s)) for e, s in enumerate((1, 1, 0.5, 1, 1))]
    assert found == [[]] * 5
    (alarm,) = one.epoch(metrics(6, advantage_zero_share=0.96))
    assert alarm.startswith("96% of the groups have no spread, the third epoch in a row")


def test_a_held_out_reward_that_falls() -> None:
    one = guard()
    assert [one.evaluation(evaluation(v)) for v in (0.8, 0.61, 0.9)] == [[]] * 3
    (alarm,) = one.evaluation(evaluation(0.59))
    assert alarm == "held-out reward judge is 0.59, 0.8 before training (alarm below 0.6)"


def test_a_held_out_reward_without_scores_says_nothing() -> None:
    one, missing = guard(), evaluation(0.8).model_copy(update={"rewards": {}})
    assert [one.evaluation(e) for e in (evaluation(0.8), missing)] == [[], []]


def test_the_gradient_is_compared_with_the_last_epochs_only() -> None:
    one = guard()
    assert [one.epoch(metrics(e, grad_norm=100.0)) for e in range(1, 4)] == [[]] * 3
    for e in range(4, 30):
        one.epoch(metrics(e, grad_norm=1.0))
    assert one.epoch(metrics(30, grad_norm=11.0))


def test_a_guard_that_is_reminded_judges_as_the_one_that_saw_it_all() -> None:
    seen = guard()
    lines = [metrics(e, reward=1.0 if e == 1 else 5.0, grad_norm=float(e)) for e in range(1, 60)]
    for line in lines:
        seen.epoch(line)
    seen.evaluation(evaluation(0.8))
    reminded = guard()
    reminded.remember([lines[0], *lines[-20:]], [evaluation(0.8)])
    for bad in ({"reward": -0.51}, {"grad_norm": 1000.0}, {"grad_norm": 900.0}):
        both = [one.epoch(metrics(60, **bad)) for one in (seen, reminded)]
        assert both[0] == both[1]
        assert both[0]
    assert reminded.evaluation(evaluation(0.1)) == seen.evaluation(evaluation(0.1)) != []


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "updates"), [("1.0", 1), ("0.1", 2)])
def test_the_example_with_an_absurd_learning_rate(rate: str, updates: int, tmp_path: Path) -> None:
    """The shipped model; its own rate of 3e-3 raises no alarm in as many updates."""
    for learning_rate, absurd in ((rate, True), ("0.003", False)):
        text = text_of_example().replace("learningRate: 0.003", f"learningRate: {learning_rate}")
        text = text.replace("updatesPerEpoch: 1", f"updatesPerEpoch: {updates}")
        spec = JobSpec.model_validate(yaml.safe_load(text)["spec"])
        torch.set_num_threads(1)
        model = families.load(spec.model, cache=tmp_path, device=CPU)
        run = build_run(spec, model, load_prompts(spec), ALONE, CPU, lambda: False)
        one = Guard(spec.guard, spec.algorithm.clip_range, ())
        alarms: list[str] = []
        while not alarms and run.updates_done < 6:
            found = loop.run_epoch(run, run.updates_done // updates)
            alarms = one.epoch(metrics().model_copy(update=snake(found)))
        assert bool(alarms) is absurd


def snake(found: dict[str, Any]) -> dict[str, Any]:
    names = {f.alias or n: n for n, f in Metrics.model_fields.items()}
    return {names[key]: value for key, value in found.items()}


# What a run does about it. One of these learning rates is absurd: weights are a tenth.
ABSURD: dict[str, object] = {
    "algorithm.epochs": 20,
    "optimizer.learningRate": 1.0,
    "algorithm.updatesPerEpoch": 2,
    "evaluation.everyEpochs": 30,
    "checkpoint.everyEpochs": 4,
}


def test_an_absurd_learning_rate_is_told_and_stopped(tmp_path: Path) -> None:
    told: list[Progress] = []
    stopping = {**ABSURD, "guard.action": "stop"}
    with pytest.raises(TrainingCollapsed, match=r"stopped the run at epoch \d+: .*learningRate"):
        session_of(spec_of(stopping), tmp_path, announce=told.append).train()
    last = rows(tmp_path, layout.METRICS)[-1]
    assert 2 * last["epoch"] < 20
    assert last["alarms"]
    assert told[-1].alarms == last["alarms"]


def test_a_usual_learning_rate_is_not(tmp_path: Path) -> None:
    calm = spec_of({**ABSURD, "optimizer.learningRate": 1e-3, "guard.action": "stop"})
    session_of(calm, tmp_path).train()
    assert not any(row["alarms"] for row in rows(tmp_path, layout.METRICS))


def test_a_warning_changes_nothing(tmp_path: Path) -> None:
    session_of(spec_of(ABSURD), tmp_path / "warned").train()
    assert any(row["alarms"] for row in rows(tmp_path / "warned", layout.METRICS))
    deaf: dict[str, object] = dict.fromkeys(
        ("guard.ratioDrift", "guard.gradNorm", "guard.zeroSpreadShare", "guard.rewardDrop"), 0.0
    )
    session_of(spec_of({**ABSURD, **deaf}), tmp_path / "deaf").train()
    one, other = final_state(tmp_path / "warned"), final_state(tmp_path / "deaf")
    assert all(torch.equal(one.trained[n], other.trained[n]) for n in one.trained)


ROLLBACK: dict[str, object] = {
    **ABSURD,
    "guard.action": "rollback",
    "guard.learningRateFactor": 0.003,
}


def test_a_rollback_goes_on_more_slowly_from_the_checkpoint(tmp_path: Path) -> None:
    told: list[Progress] = []
    session_of(spec_of(ROLLBACK), tmp_path, announce=told.append).train()
    found = rows(tmp_path, layout.METRICS)
    assert epochs(tmp_path, layout.METRICS) == list(range(1, 21))
    assert {row["rollbacks"] for row in found if row["epoch"] > 4} == {1}
    assert not found[-1]["alarms"]
    assert epochs(tmp_path, layout.EVALUATIONS)[0] == 0
    assert_course_of_what_counts(told, found)


def assert_course_of_what_counts(told: list[Progress], found: Rows) -> None:
    """A point an epoch, also right after the run went back or began again; none of lost ones."""
    assert [len(one.reward_course) for one in told] == [one.epoch for one in told]
    rewards = [row["reward"] for row in found]
    assert told[-1].reward_course == pytest.approx(rewards, rel=1e-3)


class Judge(Brightness):
    """Likes what the trained reward does not."""

    def score(
        self,
        images_N3HW: torch.Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> torch.Tensor:
        return -super().score(images_N3HW, prompts, metadata)


def test_a_held_out_reward_that_falls_takes_the_run_back(tmp_path: Path) -> None:
    """To the checkpoint before the evaluation that told it: nothing is stored after an alarm."""
    deaf = dict.fromkeys(
        ("guard.ratioDrift", "guard.gradNorm", "guard.zeroSpreadShare", "guard.rewardDrop"), 0.0
    )
    spec = spec_of(
        {
            **ROLLBACK,
            **deaf,
            "algorithm.epochs": 8,
            "optimizer.learningRate": 0.05,
            "evaluation.everyEpochs": 2,
            "checkpoint.everyEpochs": 2,
            "guard.heldOutDrop": 4.0,
        }
    )
    plain = session_of(spec, tmp_path)
    terms = [Term("brightness", 1.0, Brightness()), Term("judge", 0.0, Judge())]
    judged = replace(plain.evaluator, reward=Reward(terms))
    told: list[Progress] = []
    session = replace(plain, evaluator=judged, announce=told.append)
    session.train()
    alarms = [alarm for one in told for alarm in one.alarms]
    assert any("held-out reward judge is" in alarm for alarm in alarms)
    assert session.rollbacks == 1
    assert not any(row["alarms"] for row in rows(tmp_path, layout.EVALUATIONS))
    first, *_, last = rows(tmp_path, layout.EVALUATIONS)
    lost = first["rewards"]["judge"]["mean"] - last["rewards"]["judge"]["mean"]
    assert lost < 4.0 * first["rewards"]["judge"]["std"]


def test_a_rollback_is_not_forgotten_by_a_restart(tmp_path: Path) -> None:
    session_of(spec_of(ROLLBACK), tmp_path / "whole").train()
    parts = tmp_path / "parts"
    stops, attempt = 20, 0
    with pytest.raises(Preempted):
        session_of(spec_of(ROLLBACK), parts, stop_requested=after(stops)).train()
    attempt += 1
    told: list[Progress] = []
    second: Session = session_of(spec_of(ROLLBACK), parts, attempt=attempt, announce=told.append)
    second.train()
    assert second.rollbacks == 1
    assert_course_of_what_counts(told, rows(parts, layout.METRICS))
    assert_same_run(tmp_path / "whole", parts)


def test_rollbacks_end(tmp_path: Path) -> None:
    hopeless = {**ROLLBACK, "guard.learningRateFactor": 0.99, "guard.maxRollbacks": 2}
    session = session_of(spec_of(hopeless), tmp_path)
    with pytest.raises(TrainingCollapsed, match="after 2 rollbacks"):
        session.train()
    lr = session.run.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(0.99**2)
    work = json.loads((tmp_path / layout.PROGRESS).read_text())
    assert work["rollbacks"] == 2


def test_gradients_that_are_not_finite_are_rolled_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = {**ROLLBACK, "optimizer.learningRate": 1e-3, "algorithm.epochs": 6}
    run_epoch, broken = loop.run_epoch, [5]

    def breaking(run: Any, epoch: int) -> dict[str, Any]:
        if broken and epoch == broken[0]:
            broken.clear()
            raise TrainingDiverged("the gradient norm is nan")
        return run_epoch(run, epoch)

    monkeypatch.setattr("tempflow_trainer.session.run_epoch", breaking)
    session = session_of(spec_of(calm), tmp_path)
    session.train()
    assert session.rollbacks == 1
    assert [row["rollbacks"] for row in rows(tmp_path, layout.METRICS)] == [0, 0, 0, 0, 1, 1]
    assert replace(session).rollbacks == 1


class Refusing(FolderStore):
    """A folder that refuses the checkpoints whose turn it is, counted from 0."""

    def __init__(self, root: Path, refused: set[int]) -> None:
        super().__init__(root)
        self.refused, self.asked = refused, 0

    def put(self, file: Path, key: str) -> None:
        if key.endswith(checkpoint.COUNTERS):
            self.asked += 1
            if self.asked - 1 in self.refused:
                raise StoreUnavailable(f"cannot write {key}: refused")
        super().put(file, key)


def test_there_is_a_place_to_go_back_to_though_the_store_refused_it_once(tmp_path: Path) -> None:
    changes = {**ROLLBACK, "checkpoint.everyEpochs": 20}
    told: list[Progress] = []
    session = session_of(spec_of(changes), tmp_path, announce=told.append)
    session.checkpoints.store = Refusing(tmp_path, {0})
    session.train()
    assert session.rollbacks == 1
    assert [n for n, _ in groupby(p.failed_saves for p in told)] == [0, 1, 0]
    assert epochs(tmp_path, layout.METRICS) == list(range(1, 21))


def test_a_rollback_that_the_store_refuses_is_tried_again_before_the_run_goes_on(
    tmp_path: Path,
) -> None:
    session = session_of(spec_of({**ROLLBACK, "checkpoint.everyEpochs": 20}), tmp_path)
    session.checkpoints.store = Refusing(tmp_path, {1, 2})
    session.train()
    saves = [(row["epoch"], row["folder"] is not None) for row in rows(tmp_path, layout.SAVES)]
    assert saves == [(0, True), (0, False), (0, False), (0, True), (20, True)]


def test_fewer_rollbacks_allowed_than_there_were_end_the_run(tmp_path: Path) -> None:
    hopeless = {**ROLLBACK, "guard.learningRateFactor": 0.99}
    with pytest.raises(TrainingCollapsed, match="after 3 rollbacks"):
        session_of(spec_of({**hopeless, "guard.maxRollbacks": 3}), tmp_path).train()
    with pytest.raises(TrainingCollapsed, match="after 3 rollbacks"):
        session_of(spec_of({**hopeless, "guard.maxRollbacks": 1}), tmp_path, attempt=1).train()
