"""What the presets want of a cluster, by ``tempflow explain``: the table of docs/recipes.md.

    PYTHONPATH=sdk:trainer:. python -m benchmarks.recipes [PRESET...]

Arithmetic, not a measurement: no GPU and no weights have a part in it. A rate of 250 TFLOP/s is a
quarter of what an H100 is sold as in bfloat16.
"""

import json
import subprocess
import sys

from tempflow.manifest import parse_text
from tempflow.presets import all_presets
from tempflow_api.v1alpha1 import JobSpec

RATE = "250TFLOP/s"
GIB = 2**30
HOUR = 3600


def row(name: str, spec: JobSpec) -> str:
    """One line of the table; a process of its own, which takes up to a minute."""
    command = [sys.executable, "-m", "tempflow", "explain", "--preset", name, "--rate", RATE]
    told = json.loads(subprocess.run([*command, "-o", "json"], check=True, stdout=-1).stdout)
    compute, epochs = spec.compute, spec.algorithm.epochs
    memory, seconds = told["memory_bytes"], told["seconds"]
    size = f"{told['width']}" if told["width"] == told["height"] else "not square"
    cells = [
        f"`{name}`",
        f"{spec.model.source}, {size} px",
        f"{compute.nodes} x {compute.processes_per_node}",
        f"{memory['total'] / GIB:.0f} GiB",
        f"{(memory['text_encoders'] + memory['trajectories']) / GIB:.0f} GiB",
        f"{told['images_scored']:,}",
        f"{seconds['total']:.0f} s",
        f"{epochs:,}: {epochs * seconds['total'] / HOUR:.0f} h",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the rows of the presets that are named, or of all that want a GPU."""
    for preset in all_presets():
        spec = parse_text(preset.text, preset.name).job.spec
        wanted = preset.name in sys.argv[1:] if sys.argv[1:] else spec.compute.device == "cuda"
        if wanted:
            sys.stdout.write(row(preset.name, spec) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
