"""Runs from start to end: what they record, how they stop, and that resume is exact."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ConfigChanged, Preempted, RewardFailed
from tempflow_api.record import Evaluation, Metrics, Summary
from tempflow_api.status import Progress
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer.rewards.base import Reward, Term
from tests.numerics.toys import FLOW_GRPO, Brightness, spec_of
from tests.unit.trainer.sessions import after, epochs, final_state, folders, rows, session_of

SHORT: dict[str, object] = {
    "algorithm.epochs": 4,
    "evaluation.everyEpochs": 2,
    "checkpoint.everyEpochs": 3,
}


def spec(changes: Mapping[str, object] | None = None) -> JobSpec:
    return spec_of({**SHORT, **(changes or {})})


def assert_same_run(one: Path, other: Path) -> None:
    """Same weights, average and optimizer, and same record, to the last bit."""
    first, second = final_state(one), final_state(other)
    for part in ("trained", "average", "optimizer"):
        mine, theirs = getattr(first, part), getattr(second, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), part
    assert (first.epochs_done, first.updates_done) == (second.epochs_done, second.updates_done)
    for name in (layout.METRICS, layout.EVALUATIONS):
        assert rows(one, name) == rows(other, name)


def test_a_run_records_its_epochs_evaluations_and_checkpoints(tmp_path: Path) -> None:
    told: list[Progress] = []
    job = spec({"algorithm.updatesPerEpoch": 2})
    session_of(job, tmp_path, announce=told.append).train()
    assert epochs(tmp_path, layout.METRICS) == [1, 2, 3, 4]
    assert epochs(tmp_path, layout.EVALUATIONS) == [0, 2, 4]
    for row in rows(tmp_path, layout.EVALUATIONS):
        assert (tmp_path / row["grid"]).is_file()
    assert folders(tmp_path) == [layout.folder_name(3, 0), layout.folder_name(4, 0)]
    for line in (tmp_path / layout.METRICS).read_text().splitlines():
        Metrics.model_validate_json(line)
    assert [p.epoch for p in told] == sorted(p.epoch for p in told)
    assert {p.phase for p in told} == {
        "self-test",
        "rollout",
        "scoring",
        "update",
        "evaluation",
        "checkpoint",
        "done",
    }
    assert [p.step for p in told] == sorted(p.step for p in told)
    assert {p.step for p in told} == set(range(4 * 2 + 1))  # each is told of
    assert told[-1].phase == "done"
    assert {(p.attempt, p.incarnation, p.failed_saves) for p in told} == {(0, 1, 0)}
    assert told[-1].checkpoint_epoch == 4
    assert str(told[-1].checkpoint_uri).endswith(layout.folder_name(4, 0))
    assert Progress.model_validate_json((tmp_path / layout.PROGRESS).read_bytes()) == told[-1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"algorithm.updatesPerEpoch": 2, "algorithm.klCoefficient": 0.01}, FLOW_GRPO],
    ids=["tempflow", "two updates and a reference", "flow-grpo"],
)
def test_recorded_evaluations_and_images_are_those_of_the_plan(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    session = session_of(spec(changes), tmp_path)
    session.train()
    algorithm, plan = session.spec.algorithm, session.run.exploration.plan(0)
    groups = algorithm.prompts_per_epoch * algorithm.seeds_per_prompt
    trained = groups * plan.rows_per_group
    passes = 2 if algorithm.updates_per_epoch > 1 else 1  # old log-probabilities take a forward
    for row in rows(tmp_path, layout.METRICS):
        assert row["images"] == groups * plan.images_per_group
        assert row["evaluations"] == {
            "rollout": groups * plan.rollout_evaluations,
            "training": passes * trained,
            "reference": trained if algorithm.kl_coefficient else 0,
        }
    summary = Summary.model_validate_json((tmp_path / layout.SUMMARY).read_bytes())
    shown = 3 * 4 * session.spec.evaluation.steps
    counted = sum(sum(row["evaluations"].values()) for row in rows(tmp_path, layout.METRICS))
    stored = json.loads((tmp_path / layout.SUMMARY).read_text())
    assert stored["evaluations"] == counted + shown
    assert stored["images"] == 4 * groups * plan.images_per_group
    assert summary.epochs == 4


# Epochs done at each question: an epoch asks three times, and an evaluation, after none, two and
# four, before its only call.
DONE_WHEN_ASKED = (0, *[0] * 3, *[1] * 3, 2, *[2] * 3, *[3] * 3, 4)


@pytest.mark.parametrize(("questions", "done"), [*enumerate(DONE_WHEN_ASKED)])
def test_a_run_stopped_anywhere_and_continued_is_the_uninterrupted_run(
    tmp_path: Path, questions: int, done: int
) -> None:
    changes: dict[str, object] = {"model.ema": {"decay": 0.9, "everyUpdates": 1}}
    session_of(spec(changes), tmp_path / "whole").train()
    parts = tmp_path / "parts"
    with pytest.raises(Preempted) as caught:
        session_of(spec(changes), parts, stop_requested=after(questions)).train()
    uri = f"{parts}/checkpoints/{layout.folder_name(done, 0)}"
    assert str(caught.value) == (
        f"stopped after {done} of 4 epochs; the state is committed at {uri}"
    )
    assert epochs(parts, layout.METRICS) == list(range(1, done + 1))
    session_of(spec(changes), parts, attempt=1).train()
    assert_same_run(tmp_path / "whole", parts)


def test_totals_go_on_over_a_stop(tmp_path: Path) -> None:
    session_of(spec(), tmp_path / "whole").train()
    with pytest.raises(Preempted):
        session_of(spec(), tmp_path / "parts", stop_requested=after(6)).train()
    session_of(spec(), tmp_path / "parts", attempt=1).train()
    summaries = [
        json.loads((tmp_path / name / layout.SUMMARY).read_text()) for name in ("whole", "parts")
    ]
    for key in ("images", "evaluations", "epochs", "rewardBefore", "rewardAfter", "diversity"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.parametrize("questions", [0, 4, 10])
def test_a_run_goes_on_on_a_new_machine_with_its_whole_record(
    tmp_path: Path, questions: int
) -> None:
    session_of(spec(), tmp_path / "whole").train()
    store = tmp_path / "store"
    with pytest.raises(Preempted):
        session_of(spec(), tmp_path / "old", store=store, stop_requested=after(questions)).train()
    session_of(spec(), tmp_path / "new", store=store, attempt=1).train()
    for name in (layout.METRICS, layout.EVALUATIONS):
        expected = rows(tmp_path / "whole", name)
        assert rows(tmp_path / "new", name) == expected
        assert rows(store, name) == expected
    summary = Summary.model_validate_json((store / layout.SUMMARY).read_bytes())
    assert summary.epochs == 4
    for row in rows(store, layout.EVALUATIONS):
        assert (store / row["grid"]).is_file()


@dataclass(frozen=True)
class Breaking:
    """Brightness, until it was asked so often."""

    asked: list[None]
    least: int
    batch_size: int = 1000

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        self.asked.append(None)
        if len(self.asked) > self.least:
            raise OSError("away")
        return Brightness().score(images_N3HW, prompts, metadata)


@pytest.mark.parametrize("epochs_before_the_crash", [1, 2, 3])
def test_after_a_crash_every_epoch_is_recorded_once(
    tmp_path: Path, epochs_before_the_crash: int
) -> None:
    session_of(spec(), tmp_path / "whole").train()
    parts = tmp_path / "parts"
    session = session_of(spec(), parts)
    scorer = Breaking([], least=epochs_before_the_crash)
    # Only training asks it: evaluations keep the reward that they were built with.
    session.run = replace(session.run, reward=Reward([Term("brightness", 1.0, scorer)]))
    with pytest.raises(RewardFailed, match="away"):
        session.train()
    session_of(spec(), parts, attempt=1).train()
    assert_same_run(tmp_path / "whole", parts)


def test_a_last_line_that_a_kill_cut_off_is_written_again(tmp_path: Path) -> None:
    session_of(spec(), tmp_path / "whole").train()
    parts = tmp_path / "parts"
    with pytest.raises(Preempted):
        session_of(spec(), parts, stop_requested=after(6)).train()
    with (parts / layout.METRICS).open("a") as file:
        file.write('{"epoch": 3, "rew')
    session_of(spec(), parts, attempt=1).train()
    assert_same_run(tmp_path / "whole", parts)


def test_a_finished_run_can_be_started_again_and_prolonged(tmp_path: Path) -> None:
    session_of(spec(), tmp_path / "whole").train()
    session_of(spec({"algorithm.epochs": 3}), tmp_path / "parts").train()
    before = final_state(tmp_path / "parts")
    session_of(spec({"algorithm.epochs": 3}), tmp_path / "parts", attempt=1).train()
    again = final_state(tmp_path / "parts")
    assert all(torch.equal(before.trained[n], again.trained[n]) for n in before.trained)
    assert epochs(tmp_path / "parts", layout.METRICS) == [1, 2, 3]
    session_of(spec(), tmp_path / "parts", attempt=2).train()
    state, whole = final_state(tmp_path / "parts"), final_state(tmp_path / "whole")
    assert all(torch.equal(state.trained[n], whole.trained[n]) for n in whole.trained)
    assert epochs(tmp_path / "parts", layout.METRICS) == [1, 2, 3, 4]


def test_a_run_does_not_continue_as_another_one(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        session_of(spec(), tmp_path, stop_requested=after(3)).train()
    changed = spec({"algorithm.seed": 1, "sampling.noiseLevel": 0.5})
    with pytest.raises(ConfigChanged) as caught:
        session_of(changed, tmp_path, attempt=1).train()
    assert "spec.algorithm.seed, spec.sampling.noiseLevel" in str(caught.value)


def test_a_single_image_a_prompt_has_no_diversity_and_the_record_stays_json(
    tmp_path: Path,
) -> None:
    session_of(spec({"evaluation.imagesPerPrompt": 1}), tmp_path).train()
    for line in (tmp_path / layout.EVALUATIONS).read_text().splitlines():
        assert Evaluation.model_validate_json(line).diversity is None
    assert rows(tmp_path, layout.EVALUATIONS)
    summary = Summary.model_validate_json((tmp_path / layout.SUMMARY).read_bytes())
    assert summary.diversity is None
    assert "NaN" not in (tmp_path / layout.SUMMARY).read_text()


def test_the_exported_result_is_the_average(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    session_of(spec({"model.ema": {"decay": 0.9, "everyUpdates": 1}}), tmp_path).train()
    state = final_state(tmp_path)
    newest = tmp_path / layout.CHECKPOINTS / layout.folder_name(4, 0)
    exported = load_file(newest / layout.TRANSFORMER / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == state.average.keys()
    for name, value in exported.items():
        assert torch.equal(value, state.average[name])
        assert not torch.equal(value, state.trained[name])
    stored = JobSpec.model_validate_json((newest / layout.CONFIG).read_bytes())
    assert stored == spec({"model.ema": {"decay": 0.9, "everyUpdates": 1}})


def test_grids_can_be_switched_off(tmp_path: Path) -> None:
    session_of(spec({"tracking": {"imageGrids": False}}), tmp_path).train()
    assert {row["grid"] for row in rows(tmp_path, layout.EVALUATIONS)} == {None}
    assert not list((tmp_path / layout.GRIDS).iterdir())
