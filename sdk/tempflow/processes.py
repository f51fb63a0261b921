"""A child process, everything that it started, and the signals that reach us meanwhile."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


def kill_tree(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that leads a session of its own, and all that it started.

    torchrun gives each worker a session, so the process group alone would leave them behind; the
    parents have to be read before the first of them dies. Of a child that has ended, the rest of
    its group is killed: nobody is left who would stop it.
    """
    below = descendants(child.pid) if child.poll() is None else []
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    for pid in below:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``, as far as the system tells."""
    children: dict[int, list[int]] = {}
    for process, parent in _parents():
        children.setdefault(parent, []).append(process)
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """``(process, parent)`` of every process: from /proc on Linux, from ps elsewhere."""
    if Path("/proc/self/stat").exists():
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                # The name, in parentheses, may contain anything; state and parent follow it.
                after_name = (folder / "stat").read_text().rpartition(")")[2]
                yield int(folder.name), int(after_name.split()[1])
        return
    listing = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False
    )
    for line in listing.stdout.splitlines():
        process, parent = line.split()
        yield int(process), int(parent)


class StopRequests:
    """Signals that ask this process to stop, counted while ``listening``."""

    def __init__(self) -> None:
        self.interrupts = 0
        """Ctrl-C."""
        self.terminations = 0
        """SIGTERM, or SIGHUP when the terminal closes."""

    @property
    def count(self) -> int:
        return self.interrupts + self.terminations

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
        else:
            self.terminations += 1

    @contextmanager
    def listening(self) -> Iterator["StopRequests"]:
        """Count instead of die. Off the main thread, where Python delivers no signals, nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
