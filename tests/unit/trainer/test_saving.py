"""Saves beside the training: what it waits for, and when failures end it."""

import threading
from pathlib import Path

import pytest
import torch

from tempflow_api.errors import Fenced, StoreUnavailable, Uncommitted
from tempflow_api.record import Save as Line
from tempflow_api.retention import Retention
from tempflow_trainer.checkpoint import Checkpoints, State
from tempflow_trainer.saving import Save, Saver
from tempflow_trainer.store import FolderStore


class Gate(FolderStore):
    """A folder whose files wait for permission, or are refused."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.open = threading.Event()
        self.open.set()
        self.refused = False

    def put(self, file: Path, key: str) -> None:
        self.open.wait(20)
        if self.refused and key.startswith("checkpoints/"):
            raise StoreUnavailable(f"cannot write {key}: refused")
        super().put(file, key)


class Beside:
    """A saver on such a folder, and what it told."""

    def __init__(self, folder: Path, wait_seconds: float = 20) -> None:
        self.store = Gate(folder / "store")
        self.run = Checkpoints(self.store, folder, 0, world_size=1, retention=Retention(2))
        self.run.begin()
        self.ended: list[Save] = []
        self.lines: list[Line] = []
        self.after: list[int] = []
        """Lines that were there each time."""
        self.weights = {"w": torch.zeros(3)}
        self.saver = Saver(
            self.run,
            wait_seconds=wait_seconds,
            most_failures=2,
            on_end=self.ended.append,
            write=self.lines.append,
            after=lambda: self.after.append(len(self.lines)),
        )

    def offer(self, step: int) -> bool:
        """What a session does when a save is due."""
        if not self.saver.ready(step):
            return False
        self.saver.begin(self.state(step), lambda _folder: None, {"reward": float(step)})
        return True

    def state(self, step: int) -> State:
        values = {name: value.clone() for name, value in self.weights.items()}
        return State(step, step, values, values, {}, {})

    def steps(self) -> list[int]:
        return [folder.step for folder in self.run.committed()]


@pytest.fixture
def beside(tmp_path: Path) -> Beside:
    return Beside(tmp_path)


def test_training_changes_the_weights_while_the_old_ones_are_stored(beside: Beside) -> None:
    beside.store.open.clear()
    assert beside.offer(1)
    beside.weights["w"] += 7
    assert not beside.saver.settle(0)
    assert beside.ended == []
    beside.store.open.set()
    assert beside.saver.settle(20)
    (save,) = beside.ended
    assert (save.step, save.error, beside.after) == (1, None, [1]), "what is sent has its line"
    assert save.bytes > 0
    assert save.folder is not None
    assert torch.equal(beside.run.load(save.folder).trained["w"], torch.zeros(3))


def test_a_save_that_is_due_too_early_is_skipped(tmp_path: Path) -> None:
    beside = Beside(tmp_path, wait_seconds=0.05)
    beside.store.open.clear()
    assert beside.offer(1)
    assert not beside.offer(2)
    beside.store.open.set()
    assert beside.saver.settle(20)
    assert beside.offer(3)
    assert beside.saver.settle(20)
    assert beside.steps() == [3, 1]
    assert sorted((line.epoch, bool(line.folder)) for line in beside.lines) == [
        (1, True),
        (2, False),
        (3, True),
    ]
    (skipped,) = (line for line in beside.lines if line.error)
    assert skipped.error == "skipped, as the one before took more than 0.05 s"


def test_a_success_forgives_and_failures_in_a_row_end_the_run(beside: Beside) -> None:
    for step, refused in enumerate((True, False, True), start=1):
        beside.store.refused = refused
        assert beside.offer(step)
        assert beside.saver.settle(20)
    assert [save.error is None for save in beside.ended] == [False, True, False]
    beside.offer(4)
    with pytest.raises(Uncommitted, match=r"2 checkpoints in a row .*: cannot write .*refused"):
        beside.saver.settle(20)
    assert beside.steps() == [2]
    assert len(beside.after) == 1


@pytest.mark.parametrize("error", [StoreUnavailable("denied"), FileNotFoundError("gone"), None])
def test_the_record_is_stored_before_the_checkpoint_counts_but_it_may_fail(
    beside: Beside, error: Exception | None
) -> None:
    counted: list[list[int]] = []

    def store_record() -> None:
        counted.append(beside.steps())
        if error is not None:
            raise error

    saver = Saver(
        beside.run,
        before=store_record,
        wait_seconds=20,
        most_failures=2,
        on_end=beside.ended.append,
        write=beside.lines.append,
        after=lambda: None,
    )
    saver.begin(beside.state(1), lambda _folder: None, {})
    assert saver.settle(20)
    assert counted == [[]]
    assert beside.steps() == [1]
    assert [save.error for save in beside.ended] == [None]


def test_a_start_that_was_taken_over_learns_it(beside: Beside, tmp_path: Path) -> None:
    Checkpoints(FolderStore(tmp_path / "store"), tmp_path, 1, 1, Retention(2)).begin()
    beside.offer(1)
    with pytest.raises(Fenced, match="start 1 of attempt 1 has taken the run"):
        beside.saver.settle(20)
    assert beside.steps() == []


def test_one_that_is_taken_over_after_its_commit_learns_it_too(
    beside: Beside, tmp_path: Path
) -> None:
    def copies_its_record() -> None:
        Checkpoints(FolderStore(tmp_path / "store"), tmp_path, 1, 1, Retention(2)).begin()
        beside.run.check()

    saver = Saver(
        beside.run,
        wait_seconds=20,
        most_failures=2,
        on_end=beside.ended.append,
        write=beside.lines.append,
        after=copies_its_record,
    )
    saver.begin(beside.state(1), lambda _folder: None, {})
    with pytest.raises(Fenced):
        saver.settle(20)
    assert [save.folder is not None for save in beside.ended] == [True]


def test_a_bug_is_not_a_store_that_refuses(beside: Beside) -> None:
    def broken(_folder: Path) -> None:
        raise ZeroDivisionError

    beside.saver.begin(beside.state(1), broken, {})
    with pytest.raises(ZeroDivisionError):
        beside.saver.settle(20)
