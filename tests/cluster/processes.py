"""Daemons of the test cluster: started detached, recorded with their pid, ended by that pid only.

The record is `state.json` in the state folder. A pid alone may have gone to another process, so the
record also holds when the process started, and nothing is signalled unless both fit.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.layout import MARK, StateFolder
from tests.cluster.waiting import wait_for


@dataclass(frozen=True)
class Process:
    """A process that the test cluster started: pid and start time (clock ticks since boot)."""

    pid: int
    start_ticks: int

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie has ended."""
        status = _status(self.pid)
        return status is not None and not status.ended and status.start_ticks == self.start_ticks

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process is gone or its pid belongs to another by now."""
        if self.alive():
            with suppress(ProcessLookupError):  # it ended between the look and the signal
                os.kill(self.pid, number)

    def end(self, *, grace_seconds: float) -> None:
        """SIGTERM, then SIGKILL once the grace is over; returns when the process is gone."""
        if grace_seconds > 0:
            self.signal(signal.SIGTERM)
            try:
                wait_for("", self._gone, deadline_seconds=grace_seconds, poll_seconds=0.05)
                return
            except ClusterError:
                pass  # it did not listen
        self.signal(signal.SIGKILL)
        wait_for(f"end of process {self.pid}", self._gone, deadline_seconds=30, poll_seconds=0.02)

    def _gone(self) -> bool:
        # A child of ours, as it is when pytest started the cluster, has to be reaped.
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        return not self.alive()


@dataclass
class Ledger:
    """What the cluster has started and changed on this machine; every change is written at once."""

    state: StateFolder
    daemons: dict[str, Process] = field(default_factory=dict)
    sysctls_before: dict[str, str] = field(default_factory=dict)
    created_paths: list[str] = field(default_factory=list)
    ready: bool = False

    @classmethod
    def read(cls, state: StateFolder) -> "Ledger":
        """The recorded ledger, or an empty one."""
        try:
            stored = json.loads(state.ledger.read_text())
        except FileNotFoundError:
            return cls(state)
        except ValueError:
            return cls(state)  # cut off while being written: the mark in /proc finds the daemons
        daemons = {name: Process(**fields) for name, fields in stored["daemons"].items()}
        return cls(
            state, daemons, stored["sysctls_before"], stored["created_paths"], stored["ready"]
        )

    def write(self) -> None:
        self.state.root.mkdir(parents=True, exist_ok=True)
        record = {
            "daemons": {name: asdict(process) for name, process in self.daemons.items()},
            "sysctls_before": self.sysctls_before,
            "created_paths": self.created_paths,
            "ready": self.ready,
        }
        unfinished = self.state.ledger.with_suffix(".new")
        unfinished.write_text(json.dumps(record, indent=1))
        unfinished.replace(self.state.ledger)

    def log_of(self, name: str) -> Path:
        return self.state.logs / f"{name}.log"

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        namespace: str | None = None,
    ) -> Process:
        """Start a daemon, in a network namespace if named, and record it."""
        self.state.logs.mkdir(parents=True, exist_ok=True)
        # nsenter and not `ip netns exec`: that one hides the cgroup mounts, and the kubelet dies.
        enter = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
        with self.log_of(name).open("ab") as log:
            child = subprocess.Popen(
                [*enter, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, MARK: str(self.state.root)},
            )
        status = _status(child.pid)
        if status is None:
            raise ClusterError(f"{name} ended at once: {self.last_line(name)}")
        # The daemon outlives this object on purpose; without this, Popen's finaliser complains.
        child.returncode = 0
        process = self.daemons[name] = Process(child.pid, status.start_ticks)
        self.write()
        return process

    def end(self, name: str, *, grace_seconds: float) -> None:
        """End one recorded daemon and forget it; nothing happens when it is not recorded."""
        process = self.daemons.get(name)
        if process is not None:
            process.end(grace_seconds=grace_seconds)
            del self.daemons[name]
            self.write()

    def running(self, name: str) -> bool:
        process = self.daemons.get(name)
        return process is not None and process.alive()

    def must_run(self, name: str) -> None:
        """ClusterError with the daemon's last words when it has ended."""
        if not self.running(name):
            raise ClusterError(f"{name} has ended: {self.last_line(name)}")

    def last_line(self, name: str) -> str:
        """What the daemon wrote last, with the file to read on in."""
        path = self.log_of(name)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return f"{lines[-1][-300:] if lines else 'it wrote nothing'} ({path})"


def marked(state: StateFolder) -> Iterator[Process]:
    """Every process that carries this state folder's mark, recorded or not, but for this one.

    And their children: those of a containerd shim are the first processes of containers.
    """
    with_mark = set(_marked_pids(state))
    for pid, status in _statuses():
        if pid in with_mark or status.parent in with_mark:
            yield Process(pid, status.start_ticks)


def _marked_pids(state: StateFolder) -> Iterator[int]:
    wanted = f"{MARK}={state.root}".encode()
    for pid, _ in _statuses():
        with suppress(OSError):  # it has ended meanwhile
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if wanted in environment and pid != os.getpid():
                yield pid


@dataclass(frozen=True)
class _Status:
    """What /proc says of a process."""

    ended: bool  # a zombie has
    parent: int
    start_ticks: int


def _statuses() -> Iterator[tuple[int, _Status]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            status = _status(int(folder.name))
            if status is not None:
                yield int(folder.name), status


def _status(pid: int) -> _Status | None:
    """The status of a pid, or None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold spaces: count from the last parenthesis, where field 3 of
    # proc(5) comes first, the state; then 4 the parent, 20 the threads, 22 the start time.
    fields = text.rpartition(")")[2].split()
    # A killed process is a zombie before its last threads have ended, and these hold its ports.
    ended = fields[0] in "ZX" and int(fields[17]) <= 1
    return _Status(ended, int(fields[1]), int(fields[19]))
