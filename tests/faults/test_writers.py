"""Real processes killed, and paused, at every request of a save.

The invariant: whoever comes next finds the old checkpoint or the new one, whole; and what a process
writes after a newer start has claimed the run never counts.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tempflow.checkpoints import Store, open_store, steps
from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ExitCode
from tests.faults import writer
from tests.faults.s3_proxy import Fault, Proxy, Seen

pytestmark = pytest.mark.faults

PATIENCE_SECONDS = 60


def requests_of_a_save(s3: Proxy, uri: str, folder: Path) -> list[Seen]:
    """Those of the third checkpoint, when the first one is deleted after it."""
    run = writer.start(s3.endpoint, uri, folder)
    for step in (1, 2):
        run.save(writer.state(step), writer.export)
    s3.clear()
    run.save(writer.state(3), writer.export)
    return list(s3.log)


@cache
def reader(endpoint: str) -> Store:
    return open_store("s3://runs", endpoint, "us-east-1")


def listed(s3: Proxy, uri: str) -> list[str]:
    """What the command line shows."""
    found = steps(replace(reader(s3.endpoint), root=uri.removeprefix("s3://"), uri=uri))
    assert all(step.manifest is not None for step in found)
    return [step.folder for step in reversed(found)]


class At:
    """Holds the request at one position of a save, counted among those of ``operation``, until it
    is let go.

    Then the server gets it, unless it is ``lost``; or it is held when the server has applied it.
    """

    def __init__(
        self,
        s3: Proxy,
        position: int,
        *,
        operation: str = ".*",
        applied: bool = False,
        lost: bool = False,
    ) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

        def hold(seen: Seen) -> None:
            self.held = seen
            self.reached.set()
            self.go.wait(PATIENCE_SECONDS)

        fault = Fault(operation, skip=position, times=1, status=503 if lost else None)
        if applied:
            fault.after = hold
        else:
            fault.before = hold
        self._s3, self._fault = s3, fault

    def arm(self) -> None:
        self._s3.add(self._fault)

    def wait(self, process: BaseProcess) -> None:
        assert self.reached.wait(PATIENCE_SECONDS), f"never got there: {process.exitcode}"


def prepared(
    s3: Proxy,
    uri: str,
    folder: Path,
    at: At,
    *then: int,
    export: Callable[[Path], None] = writer.export,
) -> BaseProcess:
    """A process that saves step 3 and is held at the request; steps 1 and 2 are complete."""
    run = writer.start(s3.endpoint, uri, folder)
    for step in (1, 2):
        run.save(writer.state(step), writer.export)
    s3.clear()
    # Its claim is not what is interrupted: count from the first request of its save.
    claimed, armed = threading.Event(), threading.Event()

    def hold(_seen: Seen) -> None:
        claimed.set()
        armed.wait(PATIENCE_SECONDS)

    s3.add(Fault(operation="PutObject", key=r"ledger/", times=1, after=hold))
    process = writer.process(s3.endpoint, uri, folder, (3, *then), export)
    process.start()
    assert claimed.wait(PATIENCE_SECONDS)
    s3.clear()
    at.arm()
    armed.set()
    at.wait(process)
    return process


@pytest.fixture(scope="module")
def save(moto: Proxy, tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """The requests of one undisturbed save."""
    moto.clear()
    uri = "s3://runs/undisturbed"
    return requests_of_a_save(moto, uri, tmp_path_factory.mktemp("undisturbed"))


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


POSITIONS = range(18)


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


def position_of(save: list[Seen], key: str) -> int:
    """Of the request of a save that writes it."""
    return next(i for i, r in enumerate(save) if r.operation == "PutObject" and key in r.key)


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
