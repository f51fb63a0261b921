"""What is mounted where, and undoing it below a folder.

`os.path.ismount` misses a folder that is mounted on itself, as `ip netns` and buildah do.
"""

import subprocess
from pathlib import Path

from tests.cluster.errors import ClusterError


def mount_points() -> list[Path]:
    """Every mount point, in the order of mounting."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # proc(5): a space is written as \040; no path that we choose holds other such characters.
    return [Path(line.split()[4].replace("\\040", " ")) for line in lines]


def unmount_below(root: Path) -> None:
    """Unmount that folder and everything in it, the latest first."""
    for mount in reversed(mount_points()):
        if mount.is_relative_to(root):
            # Lazily: a container that is being ended may still hold it.
            unmount(mount, "--lazy")


def unmount(mount: Path, *options: str) -> None:
    command = ["umount", *options, str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip()}")
