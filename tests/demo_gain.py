"""Whether the demo taught its model something, by the judge that it is never rewarded by.

python tests/demo_gain.py runs/digits
"""

import sys
from pathlib import Path

from tempflow_api import checkpoint_layout as layout
from tempflow_api.record import Summary

JUDGE = "digit-judge"
LEAST_GAIN = 0.15
"""README.md shows 0.36."""


def main(folder: Path) -> int:
    found = Summary.model_validate_json((folder / layout.SUMMARY).read_bytes()).rewards[JUDGE]
    gain = found.after - found.before
    print(f"demo: the judge finds {found.before:.3f} -> {found.after:.3f} of the prompted digits")
    if gain < LEAST_GAIN:
        print(f"demo: a gain of {gain:.3f}, at least {LEAST_GAIN} is expected")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
