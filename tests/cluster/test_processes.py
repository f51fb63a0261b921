"""Nothing is ended but what the test cluster started."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from tests.cluster.errors import ClusterError
from tests.cluster.layout import StateFolder
from tests.cluster.processes import Ledger, Process, marked
from tests.cluster.waiting import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

_SLEEPS = ["sleep", "3600"]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(StateFolder(tmp_path / "state"))


def test_daemon_is_recorded_and_ends(ledger: Ledger) -> None:
    process = ledger.start("sleeper", _SLEEPS)
    recorded = Ledger.read(ledger.state)

    assert recorded.daemons == {"sleeper": process}
    assert recorded.running("sleeper")
    recorded.end("sleeper", grace_seconds=5)

    assert not process.alive()
    assert Ledger.read(ledger.state).daemons == {}


def test_daemon_that_ignores_the_request_is_killed(ledger: Ledger) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True)"
    process = ledger.start("deaf", [sys.executable, "-c", f"{deaf}; time.sleep(3600)"])
    wait_for("deafness", lambda: "deaf" in ledger.last_line("deaf"), deadline_seconds=10)

    ledger.end("deaf", grace_seconds=0.2)

    assert not process.alive()


def test_process_that_took_over_a_pid_is_left_alone() -> None:
    somebody_else = Process(os.getpid(), start_ticks=1)

    somebody_else.end(grace_seconds=0)

    assert not somebody_else.alive()  # and we still run


def test_marked_finds_daemons_and_their_children_without_a_record(ledger: Ledger) -> None:
    parent = ledger.start("parent", ["sh", "-c", "env -i sleep 3600 & wait"])
    other = Ledger(StateFolder(ledger.state.root.with_name("other")))
    stranger = other.start("stranger", _SLEEPS)
    ledger.state.ledger.unlink()

    found = wait_for(
        "the child",
        lambda: found if len(found := list(marked(ledger.state))) == 2 else None,
        deadline_seconds=10,
    )

    assert parent in found
    assert stranger not in found
    for process in [*found, stranger]:
        process.end(grace_seconds=0)


def test_last_words_of_a_daemon_that_ended_are_told(ledger: Ledger) -> None:
    process = ledger.start("failing", ["sh", "-c", "echo no such luck; exit 1"])
    wait_for("its end", lambda: not process.alive(), deadline_seconds=10)

    with pytest.raises(ClusterError, match="failing has ended: no such luck"):
        ledger.must_run("failing")


def test_half_written_record_is_an_empty_one(ledger: Ledger) -> None:
    ledger.write()
    ledger.state.ledger.write_text(ledger.state.ledger.read_text()[:20])

    assert Ledger.read(ledger.state).daemons == {}


def test_record_keeps_everything(ledger: Ledger) -> None:
    ledger.sysctls_before = {"kernel/panic": "0"}
    ledger.created_paths = ["/run/netns"]
    ledger.ready = True
    ledger.write()

    assert dataclasses.asdict(Ledger.read(ledger.state)) == dataclasses.asdict(ledger)


def test_deadline_is_told_with_what_was_waited_for() -> None:
    with pytest.raises(ClusterError, match="Godot: not so after 0 s"):
        wait_for("Godot", lambda: None, deadline_seconds=0)
