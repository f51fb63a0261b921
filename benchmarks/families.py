"""Seconds and peak host memory of every phase, for a tiny random model of each family.

    OMP_NUM_THREADS=1 PYTHONPATH=sdk:trainer:. python -m benchmarks.families

Each family runs in a process of its own: load, three epochs of which the last is reported, export.
The peak is the kernel's high-water mark of resident memory, set back before every phase (Linux);
"above start" is what the phase adds to an interpreter that has imported everything.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# torch and the families are imported in the processes that measure.
FAMILIES = ("digits", "sd3", "flux", "qwen-image", "flux2-klein")
PHASES = ("load", "rollout", "scoring", "update", "export")


@dataclass
class Peaks:
    """Seconds and peak bytes by phase; a phase ends when the next one begins."""

    start: int
    phases: dict[str, tuple[float, int]] = field(default_factory=dict)
    _phase: str = ""
    _since: float = 0.0

    def begin(self, phase: str) -> None:
        """End the phase before, and begin this one."""
        if self._phase:
            self.phases[self._phase] = (time.perf_counter() - self._since, high_water())
        self._phase, self._since = phase, time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back


def high_water() -> int:
    """Most resident bytes since the mark was set back."""
    status = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def measure(family: str, tuning: str) -> dict[str, object]:
    """In this process: the phases of one family."""
    import torch

    from tempflow_trainer import loop, main
    from tempflow_trainer.data import load_prompts
    from tests.unit.trainer import family_cases as cases

    torch.set_num_threads(1)
    every = (cases.DIGITS, cases.SD3, cases.FLUX, cases.QWEN, cases.KLEIN)
    [case] = [case for case in every if case.family == family]
    with tempfile.TemporaryDirectory() as folder:
        spec = case.spec(Path(folder), tuning=tuning)
        __import__("tempflow_trainer.models." + family.replace("-", "_"))
        Path("/proc/self/clear_refs").write_text("5")
        peaks = Peaks(high_water())
        peaks.begin("load")
        model = case.load(Path(folder))
        peaks.begin("")
        run = main.build_run(spec, model, load_prompts(spec), cases.ALONE, cases.CPU, _never)
        run.clock.on_phase = peaks.begin
        for epoch in range(3):
            loop.run_epoch(run, epoch)
        peaks.begin("export")
        run.tuning.export(Path(folder) / "result")
        peaks.begin("")
        weights = sum(p.numel() for p in model.transformer.parameters())
    return {"family": family, "weights": weights, "start": peaks.start, "phases": peaks.phases}


def _never() -> bool:
    return False


def table(found: Sequence[dict[str, object]]) -> str:
    """In Markdown: a line a family, milliseconds and MiB above the start by phase."""
    lines = ["| family | transformer | " + " | ".join(PHASES) + " |", "|---" * 7 + "|"]
    for one in found:
        cells = []
        for phase in PHASES:
            seconds, peak = one["phases"][phase]  # type: ignore[index]
            cells.append(f"{1000 * seconds:.0f} ms, {(peak - one['start']) / 2**20:.0f} MiB")
        lines.append(f"| {one['family']} | {one['weights']:,} | " + " | ".join(cells) + " |")
    starts = [int(one["start"]) / 2**20 for one in found]  # type: ignore[call-overload]
    lines.append(f"\nThe interpreter with all imports: {min(starts):.0f} to {max(starts):.0f} MiB.")
    return "\n".join(lines)


def in_a_process(family: str, tuning: str) -> dict[str, object]:
    """The measurement of one family, not disturbed by what another has left."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.families", "--only", family, "--tuning", tuning],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--only", choices=FAMILIES, help="print the figures of one, as JSON")
    parser.add_argument("--tuning", choices=["lora", "full"], default="lora")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.tuning)))
    else:
        print(table([in_a_process(family, given.tuning) for family in FAMILIES]))


if __name__ == "__main__":
    main()
