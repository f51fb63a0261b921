"""What `examples/digits.yaml` adds by the judge that is never rewarded: mean and interval.

    python -m benchmarks.demo --seeds 0 1 2

Each seed is one `tempflow run` of the example in a folder of its own, judged at a last evaluation
from the same noise as at the first.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples/digits.yaml"
IMAGES_PER_PROMPT = 50
# Two-sided 95 % points of Student's t by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}


def run(seed: int, folder: Path) -> tuple[dict[str, dict[str, dict[str, float]]], float]:
    """Summary of one run, and the seconds it took from command to prompt."""
    settings = [
        f"spec.algorithm.seed={seed}",
        f"spec.evaluation.imagesPerPrompt={IMAGES_PER_PROMPT}",
        "spec.evaluation.everyEpochs=1000",
    ]
    command = [sys.executable, "-m", "tempflow", "run", str(EXAMPLE), "-o", "json"]
    command += ["--work-dir", str(folder / f"seed-{seed}")]
    command += [word for setting in settings for word in ("--set", setting)]
    start = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout), time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    gains, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            summary, took = run(seed, Path(folder))
            judge, diversity = summary["rewards"]["digit-judge"], summary["diversity"]
            gains.append(100 * (float(judge["after"]) - float(judge["before"])))
            seconds.append(took)
            print(
                f"seed {seed}: judge {judge['before']:.3f} -> {judge['after']:.3f}, "
                f"reward {summary['rewardBefore']['mean']:.2f} -> "
                f"{summary['rewardAfter']['mean']:.2f}, "
                f"diversity {diversity['before']:.3f} -> {diversity['after']:.3f}, "
                f"{took:.0f} s"
            )
    mean = statistics.mean(gains)
    print(f"gain by the judge: {mean:.1f} points", end="")
    if len(gains) > 1:
        half = T_95[len(gains) - 1] * statistics.stdev(gains) / math.sqrt(len(gains))
        print(f", 95 % interval {mean - half:.1f} to {mean + half:.1f}", end="")
    print(f", {statistics.mean(seconds):.0f} s a run")


if __name__ == "__main__":
    main()
