"""The memory of a phase is what the phase needed, not what one before it did."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.families import PHASES, table

MEBIBYTE = 2**20
ROOT = Path(__file__).parents[3]


ASK = """
import torch
from benchmarks.families import Peaks, high_water
peaks = Peaks(high_water())
peaks.begin("large")
block = torch.ones(64 * 2**20 // 4)
del block
peaks.begin("small again")
peaks.begin("")
print(peaks.phases["large"][1] - peaks.phases["small again"][1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_a_peak_is_of_its_phase() -> None:
    # In a process of its own: in a large one the kernel takes pages away meanwhile.
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 56 * MEBIBYTE < int(done.stdout) < 80 * MEBIBYTE


def test_the_table_has_a_cell_a_phase() -> None:
    phases = dict.fromkeys(PHASES, (0.25, 11 * MEBIBYTE))
    found = table([{"family": "x", "weights": 1000, "start": MEBIBYTE, "phases": phases}])
    assert found.splitlines()[2] == "| x | 1,000 |" + " 250 ms, 10 MiB |" * len(PHASES)
