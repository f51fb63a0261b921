"""The last lines of a rank's log, in the run's folder and in the store."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import StoreUnavailable
from tempflow_trainer.log_tail import ATTEMPTS, LINES, MOST_CHARACTERS, LogTail
from tempflow_trainer.record_copy import RecordCopy
from tempflow_trainer.store import FolderStore


def lines(folder: Path, rank: int = 0, attempt: int = 0) -> list[str]:
    return (folder / layout.log_key(attempt, rank)).read_text(encoding="utf-8").splitlines()


def said(tail: LogTail, *messages: str) -> None:
    log = logging.getLogger("tests.log-tail")
    log.setLevel(logging.INFO)
    log.addHandler(tail)
    for message in messages:
        log.info(message)
    log.removeHandler(tail)


def test_the_last_lines_are_kept_and_long_ones_are_cut(tmp_path: Path) -> None:
    tail = LogTail(3, 0)
    tail.connect(tmp_path / "run", FolderStore(tmp_path / "store"))
    said(tail, *(f"line {n}" for n in range(2 * LINES)), "two\nlines", "x" * 10_000)
    tail.send()
    found = lines(tmp_path / "store", 3)
    assert len(found) == LINES
    assert found[-4:] == [f"line {2 * LINES - 1}", "two", "lines", "x" * MOST_CHARACTERS]
    assert found == lines(tmp_path / "run", 3)


@pytest.mark.parametrize("store", ["run-1", "store"], ids=["in place", "elsewhere"])
def test_a_later_start_goes_on_below_a_heading_of_its_own(tmp_path: Path, store: str) -> None:
    """Elsewhere, it starts on a machine without files."""
    machines = ["run-1", "run-1"] if store == "run-1" else ["run-1", "run-2"]
    for start, machine in enumerate(machines):
        tail = LogTail(0, 0)
        said(tail, f"before the store is known, {start}")
        tail.connect(tmp_path / machine, FolderStore(tmp_path / store))
        said(tail, f"after, {start}")
        tail.send()
    found = lines(tmp_path / store)
    assert [line.partition(" 20")[0] for line in found] == [
        "=== started",
        "before the store is known, 0",
        "after, 0",
        "=== started",
        "before the store is known, 1",
        "after, 1",
    ]


def test_attempts_do_not_touch_newer_ones_and_old_ones_are_forgotten(tmp_path: Path) -> None:
    tails = [LogTail(rank, attempt) for attempt in range(ATTEMPTS + 2) for rank in (0, 1)]
    tails.append(LogTail(0, 3))  # taken over long ago, and woken
    for tail in tails:
        said(tail, "here")
        tail.connect(tmp_path / "run", FolderStore(tmp_path / "store"))
        tail.send()
    assert sorted(FolderStore(tmp_path / "store").find(layout.LOGS)) == [
        layout.log_key(attempt, rank) for attempt in range(2, ATTEMPTS + 2) for rank in (0, 1)
    ]
    assert lines(tmp_path / "store", attempt=ATTEMPTS + 1)[1:] == ["here"]


def test_the_copy_of_the_record_leaves_logs_to_their_ranks(tmp_path: Path) -> None:
    """Else rank 0 would overwrite what the rank of another machine has stored."""
    run, store = tmp_path / "run", FolderStore(tmp_path / "store")
    tail = LogTail(1, 0)
    tail.connect(tmp_path / "other", store)
    tail.send()
    (run / layout.LOGS).mkdir(parents=True)
    (run / layout.log_key(0, 1)).write_text("stale")
    RecordCopy(run, store, lambda: None).send()
    assert lines(tmp_path / "store", 1)[0].startswith("=== started")
    RecordCopy(tmp_path / "new", store, lambda: None).fetch()
    assert not (tmp_path / "new" / layout.LOGS).exists()


class Refusing(FolderStore):
    def put(self, file: Path, key: str) -> None:
        raise StoreUnavailable(f"cannot write {key}: full")


def test_a_store_that_refuses_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tail = LogTail(0, 0)
    tail.connect(tmp_path / "run", Refusing(tmp_path / "store"))
    tail.send()
    assert "the last lines of the log could not be stored: cannot write record/logs" in caplog.text
    assert lines(tmp_path / "run")[0].startswith("=== started")


def test_nothing_is_written_before_there_is_a_place(tmp_path: Path) -> None:
    LogTail(0, 0).send()
    assert list(tmp_path.iterdir()) == []


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_training_does_not_wait_for_it(tmp_path: Path) -> None:
    tail = LogTail(0, 0)
    tail.connect(tmp_path / "run", FolderStore(tmp_path / "store"))
    tail.send_beside()
    until((tmp_path / "store" / layout.log_key(0, 0)).is_file)
