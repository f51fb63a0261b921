"""A writer that is held at one request of a save."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

from tempflow.checkpoints import Store, open_store, steps
from tests.faults import writer
from tests.faults.s3_proxy import Fault, Proxy, Seen

PATIENCE_SECONDS = 60
# Requests of a save, each of which is interrupted.
POSITIONS = range(18)


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


def position_of(save: list[Seen], key: str) -> int:
    """Of the request of a save that writes it."""
    return next(i for i, r in enumerate(save) if r.operation == "PutObject" and key in r.key)
