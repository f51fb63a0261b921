"""Trackers: what the record says, once, on the same curves after a stop; nothing is sent here."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ManifestInvalid, Preempted
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import tracking
from tempflow_trainer.tracking import TENSORBOARD, Tracking, numbers
from tests.numerics.toys import spec_of
from tests.unit.trainer.sessions import after, rows, session_of
from tests.unit.trainer.test_guard import metrics

SHORT: dict[str, object] = {
    "algorithm.epochs": 4,
    "evaluation.everyEpochs": 2,
    "checkpoint.everyEpochs": 2,
}


def train(spec: JobSpec, folder: Path, **how: Any) -> None:
    session = session_of(spec, folder, **how)
    session.tracking = Tracking.of(spec, "demo", folder)
    session.train()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(folder / TENSORBOARD))
    read.Reload()
    return [(point.step, point.value) for point in read.Scalars(name)]


def test_tensorboard_has_every_number_of_the_record(tmp_path: Path) -> None:
    train(spec_of({**SHORT, "tracking.tensorboard": True}), tmp_path)
    expected = [(row["epoch"], row["reward"]) for row in rows(tmp_path, layout.METRICS)]
    assert dict(curve(tmp_path, "train/reward")) == pytest.approx(dict(expected))
    shown = [(row["epoch"], row["diversity"]) for row in rows(tmp_path, layout.EVALUATIONS)]
    assert dict(curve(tmp_path, "eval/diversity")) == pytest.approx(dict(shown))
    read = EventAccumulator(str(tmp_path / TENSORBOARD))
    read.Reload()
    assert [image.step for image in read.Images("eval/grid")] == [0, 2, 4]
    assert "train/evaluations/rollout" in read.Tags()["scalars"]


@pytest.mark.parametrize("stops", [0, 4, 10])
def test_tensorboards_curves_go_on_after_a_stop(stops: int, tmp_path: Path) -> None:
    spec = spec_of({**SHORT, "tracking.tensorboard": True})
    train(spec, tmp_path / "whole")
    with pytest.raises(Preempted):
        train(spec, tmp_path / "parts", stop_requested=after(stops))
    train(spec, tmp_path / "parts", attempt=1)
    for name in ("train/reward", "eval/reward", "train/gradNorm"):
        assert curve(tmp_path / "parts", name) == curve(tmp_path / "whole", name)


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from its own file; a second start has the same identity."""
    records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    datastore: Any = importlib.import_module("wandb.sdk.internal.datastore")

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    spec = spec_of({**SHORT, "tracking.wandb": {"project": "p", "mode": "offline"}})
    with pytest.raises(Preempted):
        train(spec, tmp_path, stop_requested=after(7))
    train(spec, tmp_path, attempt=1)
    identity = (tmp_path / layout.RECORD / "wandb-id").read_text()
    files = sorted((tmp_path / layout.RECORD / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    told: dict[int, float] = {}
    for file in files:
        store = datastore.DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            entry = records.Record()
            entry.ParseFromString(data)
            said = {item.key or item.nested_key[0]: item.value_json for item in entry.history.item}
            if "train/reward" in said:
                told[int(said["epoch"])] = float(said["train/reward"])
    assert told == pytest.approx(
        {row["epoch"]: row["reward"] for row in rows(tmp_path, layout.METRICS)}
    )


def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = spec_of({"tracking.tensorboard": True, "tracking.wandb": {}}).tracking
    tracking.require(asked)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ManifestInvalid) as caught:
        tracking.require(asked)
    assert [p.path for p in caught.value.problems] == [
        "spec.tracking.tensorboard",
        "spec.tracking.wandb",
    ]
    assert "pip install 'tempflow[wandb]'" in str(caught.value)
    tracking.require(spec_of().tracking)


def test_numbers_have_the_names_of_the_record() -> None:
    found = numbers(metrics(3, rewards={"judge": 0.5}, alarms=["x"]), "train")
    assert found["train/rewards/judge"] == 0.5
    assert found["train/gradNorm"] == 0.2
    assert not {"train/epoch", "train/time", "train/alarms"} & found.keys()
