"""Nothing in the trainer takes for granted that its tensors are the processor's."""

import subprocess
import sys
from pathlib import Path

EPOCHS = Path(__file__).parents[2] / "pretended" / "epochs.py"


def test_epochs_of_every_family_on_a_device_that_is_not_the_processor() -> None:
    """In a process of its own, as torch keeps such a device for the rest of it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EPOCHS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "11 passed" in done.stdout
