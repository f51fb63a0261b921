"""Starts the real reward service as a process, for the benchmarks that ask it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = re.compile(r"serves \S+ at (http\S+)")


@contextmanager
def serving(reward: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a service on a free port."""
    command = [sys.executable, "-m", "tempflow_trainer.rewards.serve", reward, "--port", "0"]
    process = subprocess.Popen(
        [*command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := ADDRESS.search(line):
                yield found.group(1), process.pid
                return
        raise RuntimeError("the service ended before it listened")
    finally:
        process.terminate()
        process.wait(30)
