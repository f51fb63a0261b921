"""How long ``tempflow --help`` takes, against importing typer and rich and against kubectl.

    python -m benchmarks.cli_startup [--kubectl PATH] [--runs 15]

Prints medians in milliseconds and exits 1 when the help takes more than twice the import.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

MOST = 2.0
IMPORT = [sys.executable, "-c", "import typer, rich"]
HELP = [sys.executable, "-m", "tempflow", "--help"]


def seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def medians(commands: dict[str, Sequence[str]], runs: int) -> dict[str, float]:
    """In turns, so that what else the machine does strikes all alike; the first run warms up."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            once = seconds(command)
            if turn:
                taken[name].append(once)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kubectl", default=shutil.which("kubectl"))
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    commands: dict[str, Sequence[str]] = {"import typer, rich": IMPORT, "tempflow --help": HELP}
    if given.kubectl:
        commands["kubectl version --client"] = [given.kubectl, "version", "--client"]
    found = medians(commands, given.runs)
    for name, value in found.items():
        print(f"{name:26} {1000 * value:6.0f} ms")
    ratio = found["tempflow --help"] / found["import typer, rich"]
    print(f"{'ratio':26} {ratio:6.2f} (at most {MOST})")
    return 0 if ratio <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
