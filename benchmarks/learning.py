"""TempFlow-GRPO against Flow-GRPO and against itself with one part left out, on the digits model.

    OMP_NUM_THREADS=1 PYTHONPATH=sdk:trainer:. python -m benchmarks.learning [--quick] [--seeds N]
    OMP_NUM_THREADS=1 PYTHONPATH=sdk:trainer:. python -m benchmarks.learning --report

1. One epoch of every method in turn, several rounds: seconds and evaluations of an epoch. They set
   how many epochs each method gets: as many evaluations (forward one, backward two) as so many
   epochs of TempFlow-GRPO, and again as many seconds. Seconds are processor seconds of one thread,
   which are wall seconds on an idle machine.
2. The learning rate of every method: the same grid, the same seeds, best reward at the end.
3. Other seeds with that rate, to the larger of the two budgets, evaluated at each quarter of both,
   on the same noise for all; and the control, whose rewards are shuffled within their groups.

Every result is a line of a file as soon as it is there: the same command continues, and results of
other settings or of another model are ignored. `--report` makes the tables and the plot from it.
"""

import argparse
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

from benchmarks import digits_run, learning_report
from benchmarks.learning_runs import Benchmark, Results, Scale
from benchmarks.methods import Epoch

PROCESSES = 2

FULL = Scale(
    epochs=40,
    epoch=Epoch(prompts=4, seeds=2, draws=6),
    learning_rates=(3e-3, 1e-2, 3e-2),
    tuning_seeds=(101, 102),
    seeds=(1, 2, 3, 4, 5),
    images_per_prompt=16,
    timing_rounds=7,
    results="benchmarks/results/learning.jsonl",
    plot="docs/img/learning-curves.png",
    document="docs/learning.md",
)
QUICK = Scale(
    epochs=4,
    epoch=Epoch(prompts=1, seeds=2, draws=2),
    learning_rates=(1e-3, 3e-3),
    tuning_seeds=(101,),
    seeds=(1, 2),
    images_per_prompt=2,
    timing_rounds=2,
    results="runs/benchmarks/learning-quick.jsonl",
    plot="runs/benchmarks/learning-quick.png",
    document=None,
)


def benchmark_of(scale: Scale) -> Benchmark:
    """On the results that its file has."""
    return Benchmark(scale, Results(Path(scale.results)), digits_run.model_digest())


def main() -> None:
    """Parse the command line, run what is missing, report."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a minute: does it work?")
    parser.add_argument("--seeds", type=int, help="how many reported seeds")
    parser.add_argument("--report", action="store_true", help="only from what is there")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    scale = QUICK if arguments.quick else FULL
    if arguments.seeds:
        scale = replace(scale, seeds=tuple(range(1, arguments.seeds + 1)))
    benchmark = benchmark_of(scale)
    if not arguments.report:
        tuning = benchmark.tuning_tasks()  # times the epochs, before the others work
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            benchmark.run(pool, tuning)
            benchmark.run(pool, benchmark.reported_tasks())
    learning_report.write(benchmark)


if __name__ == "__main__":
    main()
