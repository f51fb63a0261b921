"""Operators as processes that start at once: a parent that has loaded everything forks them.

    python -m tests.cluster.forking

starts an operator, in the environment that it has itself, for each line that it reads, and answers
with the process id.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from tempflow_operator import main as operator


class OperatorProcess:
    """One operator, with any number of lives."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        """``environment`` are the operator's settings, beside what this process has."""
        with log.open("wb") as output:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.forking"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, **environment},
            )
        self._pid = self._fork()

    def _fork(self) -> int:
        wanted, told = _pipe(self._parent.stdin), _pipe(self._parent.stdout)
        wanted.write("\n")
        wanted.flush()
        return int(told.readline())

    def begin_again(self) -> None:
        """Killed in the middle of whatever it does, and started as a container is."""
        self._kill()
        self._pid = self._fork()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended by itself: its log says why
            os.kill(self._pid, signal.SIGKILL)

    def end(self) -> None:
        self._kill()
        _pipe(self._parent.stdin).close()
        self._parent.wait()
        _pipe(self._parent.stdout).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def main() -> None:
    """Fork until the input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are nobody's to wait for
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdin.fileno())
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            os._exit(operator.main())
        print(pid, flush=True)


if __name__ == "__main__":
    main()
