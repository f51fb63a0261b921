"""Real processes paused at every request of a save, and woken when another start has the run.

The invariant: what a process writes after a newer start has claimed the run never counts.
"""

import os
import signal
from pathlib import Path

import pytest

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ExitCode
from tests.faults import writer
from tests.faults.held_writer import (
    PATIENCE_SECONDS,
    POSITIONS,
    At,
    listed,
    position_of,
    prepared,
)
from tests.faults.s3_proxy import Proxy, Seen

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("woken", ["after the claim", "after the commit"])
@pytest.mark.parametrize("position", POSITIONS)
def test_paused_at_a_request_and_woken_when_another_start_has_the_run(
    s3: Proxy, uri: str, tmp_path: Path, position: int, woken: str
) -> None:
    assert_woken(s3, uri, tmp_path, position, woken)


@pytest.mark.parametrize("s3", ["seaweed"], indirect=True)
def test_paused_before_its_entry_on_a_server_of_another_maker(
    s3: Proxy, uri: str, tmp_path: Path, save: list[Seen]
) -> None:
    assert_woken(s3, uri, tmp_path, position_of(save, layout.LEDGER), "after the commit")


def assert_woken(s3: Proxy, uri: str, folder: Path, position: int, woken: str) -> None:
    """A process paused at a request stops, and nothing that it wrote counts."""
    at = At(s3, position)
    # It tries to go on: that is when the one that had just committed learns of it.
    process = prepared(s3, uri, folder / "one", at, 4)
    os.kill(process.pid or 0, signal.SIGSTOP)
    newer = writer.start(s3.endpoint, uri, folder / "two")
    assert newer.parent is not None
    resumed = layout.parse_folder(newer.parent)
    assert resumed is not None
    expected = listed(s3, uri)
    assert expected[0] == newer.parent
    if woken == "after the commit":
        newer.save(writer.state(resumed.step + 1), writer.export)
        expected = listed(s3, uri)
    at.go.set()
    os.kill(process.pid or 0, signal.SIGCONT)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == ExitCode.FENCED
    # Nothing that it wrote since then counts: not listed, not pointed to, not resumed.
    assert listed(s3, uri) == expected
    written = {r.key.split("/")[2] for r in s3.log if r.key.endswith(layout.MANIFEST)}
    latest = layout.Latest.model_validate_json(writer.store(s3.endpoint, uri).read(layout.LATEST))
    assert latest.folder in {*expected, *(f.name for f in newer.committed()), newer.parent}
    assert written
    third = writer.start(s3.endpoint, uri, folder / "three")
    assert third.parent == expected[0]
    assert third.load(f"{layout.CHECKPOINTS}/{third.parent}").epochs_done >= 2
