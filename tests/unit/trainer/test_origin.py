"""Runs that start from another run, and runs that do not although one lies beside."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ModelUnavailable, Preempted, StoreUnavailable
from tempflow_api.storage import Checkpoint, InitFrom
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer.checkpoint import State
from tempflow_trainer.origin import Origin, older_runs
from tempflow_trainer.session import Session
from tempflow_trainer.store import FolderStore
from tests.numerics.toys import spec_of
from tests.unit.trainer.sessions import after, epochs, final_state, rows, session_of

SHORT: dict[str, object] = {
    "algorithm.epochs": 4,
    "evaluation.everyEpochs": 2,
    "checkpoint.everyEpochs": 2,
    "model.ema": {"decay": 0.9, "everyUpdates": 1},
}


def spec(**changes: object) -> JobSpec:
    return spec_of({**SHORT, **changes})


def starting_from(uri: Path | str, mode: str, folder: Path, given: JobSpec) -> Session:
    session = session_of(given, folder)
    init = InitFrom.model_validate({"uri": str(uri), "mode": mode})
    origin = Origin.of(init, Checkpoint(), session.checkpoints.staging)
    return replace(session, origin=origin)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A run that ended after two of four epochs."""
    with pytest.raises(Preempted):
        session_of(spec(), tmp_path / "first", stop_requested=after(8)).train()
    return tmp_path / "first"


def assert_same_state(one: State, other: State) -> None:
    assert one.epochs_done == other.epochs_done
    for part in ("trained", "average", "optimizer"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_resume_goes_on_as_the_other_run_would_have(first: Path, tmp_path: Path) -> None:
    session_of(spec(), tmp_path / "whole").train()
    second = tmp_path / "second"
    starting_from(first, "resume", second, spec()).train()
    assert_same_state(final_state(tmp_path / "whole"), final_state(second))
    assert epochs(second, layout.METRICS) == [3, 4]
    assert epochs(second, layout.EVALUATIONS) == [2, 4]
    assert rows(second, layout.METRICS) == rows(tmp_path / "whole", layout.METRICS)[2:]
    assert [f.step for f in session_of(spec(), first).checkpoints.committed()] == [2], "only read"


def test_weights_begin_anew_with_what_was_evaluated(first: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    starting_from(first, "weights", second, spec(**{"algorithm.seed": 5})).train()
    assert epochs(second, layout.METRICS) == [1, 2, 3, 4]
    evaluated = rows(first, layout.EVALUATIONS)[-1]["reward"]
    same_noise = starting_from(first, "weights", tmp_path / "third", spec())
    same_noise.train()
    assert rows(tmp_path / "third", layout.EVALUATIONS)[0]["reward"] == evaluated


def test_a_run_with_checkpoints_of_its_own_does_not_look_elsewhere(
    first: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    session = starting_from(first, "resume", second, spec())
    session.run = replace(session.run, stop_requested=after(3))
    with pytest.raises(Preempted):
        session.train()
    again = starting_from(tmp_path / "gone", "resume", second, spec())
    again.train()
    assert epochs(second, layout.METRICS) == [3, 4]


def test_one_checkpoint_can_be_named_and_is_read_once(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = first / layout.CHECKPOINTS / layout.folder_name(2, 0)
    second = tmp_path / "second"
    session = starting_from(folder, "resume", second, spec())
    read: list[str] = []
    get = FolderStore.get

    def counting(store: FolderStore, key: str, file: Path, size: int) -> str:
        read.append(key)
        return get(store, key, file, size)

    monkeypatch.setattr(FolderStore, "get", counting)
    session.train()
    assert epochs(second, layout.METRICS) == [3, 4]
    assert len(read) == len(set(read)) > 0


def test_a_run_that_was_copied_elsewhere_is_the_same_run(first: Path) -> None:
    moved = spec(**{"checkpoint.uri": "s3://other/place", "checkpoint.region": "eu-west-1"})
    session_of(moved, first).train()
    assert epochs(first, layout.METRICS) == [1, 2, 3, 4]


class OwnFolderOnly(FolderStore):
    """Whose credentials are for the run's own folder."""

    def folders(self, prefix: str) -> list[str]:
        raise StoreUnavailable(f"cannot list {prefix}: AccessDenied")


def test_older_runs_that_cannot_be_seen_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert older_runs(OwnFolderOnly(tmp_path), "demo-89abcdef") == []
    assert "cannot see whether an older run" in caplog.text
    ledger = tmp_path / "demo-0123abcd" / layout.entry_key(1)
    ledger.parent.mkdir(parents=True)
    ledger.write_text("{")
    assert older_runs(FolderStore(tmp_path), "demo-89abcdef") == []
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("wrong", ["gone", "first/checkpoints/step-0000000009-attempt-000000"])
@pytest.mark.usefixtures("first")
def test_an_address_without_checkpoint(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"spec\.initFrom\.uri: no complete checkpoint at"):
        starting_from(tmp_path / wrong, "weights", tmp_path / "second", spec()).train()


def test_weights_of_another_model(first: Path, tmp_path: Path) -> None:
    session = starting_from(first, "weights", tmp_path / "second", spec())
    assert session.origin is not None
    state = session.origin.load(session.origin.choose())
    name = next(iter(state.trained))
    odd = replace(state, trained={**state.trained, name: torch.zeros(1, 1, 1)})
    object.__setattr__(session.origin, "load", lambda _folder: odd)
    with pytest.raises(ModelUnavailable, match=r"does not fit spec\.model"):
        session.train()


def test_starting_from_zero_beside_an_older_run_is_said(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FolderStore(tmp_path)
    first.rename(tmp_path / "demo-0123abcd")
    (tmp_path / "demo-00000000").mkdir()  # has stored nothing
    (tmp_path / "other-0123abcd").mkdir()
    assert older_runs(store, "demo-89abcdef") == [f"{tmp_path}/demo-0123abcd"]
    assert older_runs(store, "demo-0123abcd") == []
    assert older_runs(store, "demo") == []
    session = session_of(spec(), tmp_path / "demo-89abcdef")
    with caplog.at_level(logging.WARNING):
        replace(session, older_runs=lambda: older_runs(store, "demo-89abcdef")).train()
    assert (
        f"STARTS FROM ZERO, although an older run of this name has checkpoints at {tmp_path}"
        in (caplog.text)
    )
