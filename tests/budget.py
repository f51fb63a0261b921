"""Run a suite, print its time, and fail when it took more than 1.5 times its budget."""

import argparse
import subprocess
import sys
import time

TOLERANCE = 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    start = time.monotonic()
    status = subprocess.run(given.command, check=False).returncode
    minutes = (time.monotonic() - start) / 60
    print(f"{given.name}: {minutes:.1f} of {given.minutes:g} minutes", flush=True)
    if status == 0 and minutes > TOLERANCE * given.minutes:
        print(f"{given.name}: over {TOLERANCE} times its budget: make it faster", flush=True)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
