"""A reward that takes longer than ranks wait for one another: two real processes on gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

RANK = """
import logging, os, sys, time
from datetime import timedelta
import torch
from dataclasses import replace
from tempflow_trainer import distributed, loop, scoring
from tempflow_trainer.rewards.base import Reward, Term
from tests.numerics.toys import Brightness, run_of, spec_of

distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=3)
scoring.BEAT_SECONDS = float(sys.argv[1])
rank = int(os.environ["RANK"])
logging.basicConfig(level=logging.INFO, stream=sys.stderr)

class Slow(Brightness):
    def score(self, *arguments):
        time.sleep(6.0 * rank)
        return super().score(*arguments)

ranks = distributed.join()
run = replace(run_of(spec_of()), ranks=ranks, reward=Reward([Term("slow", 1.0, Slow())]))
metrics = loop.run_epoch(run, 0)
print(metrics["reward"], float(sum(p.sum() for p in run.tuning.parameters().values())))
distributed.leave()
"""


def two_ranks(folder: Path, beat_seconds: float) -> list[tuple[int, str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "rank.py").write_text(RANK)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    processes = [
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
    said = [process.communicate(timeout=60) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


@pytest.mark.parametrize("beat_seconds", [0.5, 60.0], ids=["beats", "no beats"])
def test_a_reward_slower_than_the_collectives_bear_costs_time_only(
    tmp_path: Path, beat_seconds: float
) -> None:
    """Rank 1's reward takes 6 seconds, collectives 3 at most; without the beats the job dies."""
    (one, first, said), (two, second, _) = two_ranks(tmp_path, beat_seconds)
    if beat_seconds > 3:
        assert one != 0
        return
    assert (one, two) == (0, 0), said
    assert first == second
    assert "waiting for reward slow on rank 1: 0/60 images after " in said
