"""A reward that takes longer than ranks wait for one another: two real processes on gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

# No more than scoring needs: a run's imports take half a minute on a busy machine.
RANK = """
import logging, os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from tempflow_trainer import distributed, scoring

distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=3)
scoring.BEAT_SECONDS = float(sys.argv[1])
rank = int(os.environ["RANK"])
logging.basicConfig(level=logging.INFO, stream=sys.stderr)

def score(on_call):
    on_call("quick", 64)
    on_call("slow", 0)
    on_call("slow", 41)
    time.sleep(6.0 * rank)
    on_call("slow", 23)
    return {"slow": torch.full((64,), float(rank))}

# The short time-out is for collectives, not for the imports of a busy machine.
ready = [Path(__file__).with_name(f"ready-{n}") for n in range(2)]
ready[rank].touch()
while not all(file.exists() for file in ready):
    time.sleep(0.01)
ranks = distributed.join()
work = scoring.Scoring(["quick", "slow"], ranks)
work.submit(64, score)
scores = ranks.gather_rows(work.wait()["slow"])
print([float(part.sum()) for part in scores])
distributed.leave()
"""


def two_ranks(folder: Path, beat_seconds: float) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "rank.py").write_text(RANK)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return [
        subprocess.Popen(
            [sys.executable, str(folder / "rank.py"), str(beat_seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank)},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]


def test_a_reward_slower_than_the_collectives_bear_costs_time_only(tmp_path: Path) -> None:
    """Rank 1's reward takes 6 seconds, and collectives 3 at most."""
    processes = two_ranks(tmp_path, beat_seconds=0.5)
    try:
        (first, said), (second, other) = (p.communicate(timeout=60) for p in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said + other
    assert first == second == "[0.0, 64.0]\n"
    assert "waiting for reward slow on rank 1: 41/64 images after " in said


def test_without_the_beats_the_job_would_die(tmp_path: Path) -> None:
    processes = two_ranks(tmp_path, beat_seconds=60.0)
    try:
        _, said = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode != 0
    assert "Timed out" in said or "timeout" in said.lower()
