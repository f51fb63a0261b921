"""Real processes killed at every request of a save.

The invariant: whoever comes next finds the old checkpoint or the new one, whole.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tempflow_api import checkpoint_layout as layout
from tests.faults import writer
from tests.faults.held_writer import POSITIONS, At, listed, position_of, prepared
from tests.faults.s3_proxy import Proxy, Seen

pytestmark = pytest.mark.faults


def test_a_save_is_what_the_page_says(save: list[Seen]) -> None:
    """In this order; so the tests below interrupt what they think they do."""
    assert [request.operation for request in save].count("PutObject") == 8
    writes = [r.key.split("/", 1)[1] for r in save if r.operation == "PutObject"]
    folder = f"checkpoints/{layout.folder_name(3, 1)}"
    assert writes[:-3] == sorted(writes[:-3])
    assert writes[-3:] == [f"{folder}/{layout.MANIFEST}", layout.entry_key(4), layout.LATEST]
    deletes = [r.key.split("/", 1)[1] for r in save if r.operation == "DeleteObject"]
    assert deletes[0] == f"checkpoints/{layout.folder_name(1, 1)}/{layout.MANIFEST}"
    assert len(deletes) == 6
    assert len(save) == len(POSITIONS), "every one is interrupted below"


@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("position", POSITIONS)
def test_killed_at_a_request(
    s3: Proxy, uri: str, tmp_path: Path, save: list[Seen], position: int, applied: bool
) -> None:
    at = At(s3, position, applied=applied, lost=not applied)
    expected = 3 if (position, applied) >= (position_of(save, layout.LEDGER), True) else 2
    assert_killed(s3, uri, tmp_path, at, expected)


@pytest.mark.parametrize("s3", ["seaweed"], indirect=True)
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("key", [layout.MANIFEST, layout.LEDGER], ids=["manifest", "entry"])
def test_killed_at_what_decides_on_a_server_of_another_maker(
    s3: Proxy, uri: str, tmp_path: Path, save: list[Seen], key: str, applied: bool
) -> None:
    at = At(s3, position_of(save, key), applied=applied, lost=not applied)
    expected = 3 if key == layout.LEDGER and applied else 2
    assert key in str(assert_killed(s3, uri, tmp_path, at, expected))


@pytest.mark.parametrize(
    ("operation", "part", "applied"),
    [
        ("CreateMultipartUpload", 0, True),
        ("UploadPart", 1, False),
        ("CompleteMultipartUpload", 0, False),
        ("CompleteMultipartUpload", 0, True),
    ],
    ids=["created", "at a part", "before it is complete", "after"],
)
def test_killed_in_an_upload_in_parts(
    s3: Proxy, uri: str, tmp_path: Path, operation: str, part: int, applied: bool
) -> None:
    at = At(s3, part, operation=operation, applied=applied, lost=not applied)
    held = assert_killed(s3, uri, tmp_path, at, 2, export=writer.export_large)
    assert held.operation == operation


def assert_killed(
    s3: Proxy,
    uri: str,
    folder: Path,
    at: At,
    expected: int,
    export: Callable[[Path], None] = writer.export,
) -> Seen:
    """A process killed while it saves step 3 leaves the step that is expected, whole, and the run
    goes on; returns the request."""
    process = prepared(s3, uri, folder / "one", at, export=export)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    held = at.held
    at.go.set()
    s3.clear()
    found = writer.start(s3.endpoint, uri, folder / "two")
    assert found.parent is not None, held
    parent = layout.parse_folder(found.parent)
    assert parent is not None
    assert parent.step == expected, held
    state = found.load(f"{layout.CHECKPOINTS}/{found.parent}")
    assert state.epochs_done == expected
    assert float(state.trained["a"][0]) == expected
    names = listed(s3, uri)
    assert names[0] == found.parent
    found.save(writer.state(expected + 1), writer.export)
    assert len(listed(s3, uri)) == 2
    return held
