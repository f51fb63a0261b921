"""Environments of rewards whose packages do not live beside the trainer's: what their images have.

python tests/packages/environment.py      makes them below .cache/reward-images
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".cache" / "reward-images"
LOCKS = ROOT / "tools" / "reward_images"
NAMES = ("hpsv3", "image-reward")


def python(name: str) -> Path:
    return PLACE / name / "bin" / "python"


def variables(hub: Path) -> dict[str, str]:
    """For a process there: our code beside its packages, and a hub's cache instead of a network."""
    # Byte code is written: these processes import for a quarter of a minute without.
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    ours = os.pathsep.join(str(ROOT / part) for part in ("sdk", "trainer"))
    return {**kept, "PYTHONPATH": ours, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}


def build(name: str) -> None:
    """Make the environment, unless it is there and of this lock."""
    lock, ready = LOCKS / f"{name}.lock", PLACE / name / "lock"
    if ready.is_file() and ready.read_bytes() == lock.read_bytes():
        return
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run(
        [uv, "venv", "-q", "--clear", "-p", sys.executable, str(PLACE / name)], check=True
    )
    # As the Dockerfile does.
    install = [uv, "pip", "install", "-q", "--no-deps", "--require-hashes", "-r", str(lock)]
    subprocess.run([*install, "-p", str(python(name))], check=True)
    ready.write_bytes(lock.read_bytes())


def main() -> None:
    for name in NAMES:
        print(f"environment of the reward {name}", flush=True)
        build(name)


if __name__ == "__main__":
    main()
