"""The memory of a phase is what the phase needed, not what one before it did."""

import sys

import pytest
import torch

from benchmarks.families import PHASES, Peaks, high_water, table

MEBIBYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_a_peak_is_of_its_phase() -> None:
    peaks = Peaks(high_water())
    peaks.begin("large")
    block = torch.ones(64 * MEBIBYTE // 4)
    del block
    peaks.begin("small again")
    peaks.begin("")
    large, small = peaks.phases["large"][1], peaks.phases["small again"][1]
    assert 56 * MEBIBYTE < large - small < 80 * MEBIBYTE


def test_the_table_has_a_cell_a_phase() -> None:
    phases = dict.fromkeys(PHASES, (0.25, 11 * MEBIBYTE))
    found = table([{"family": "x", "weights": 1000, "start": MEBIBYTE, "phases": phases}])
    assert found.splitlines()[2] == "| x | 1,000 |" + " 250 ms, 10 MiB |" * len(PHASES)
