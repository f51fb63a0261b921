"""Nothing in the trainer takes for granted that its tensors are the processor's."""

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).parents[2] / "pretended" / "cases.py"


def test_what_the_trainer_computes_on_a_device_that_is_not_the_processor() -> None:
    """In a process of its own, as torch keeps such a device for the rest of it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "15 passed" in done.stdout
