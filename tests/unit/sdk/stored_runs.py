"""Checkpoints as the trainer stores them, as bytes by path."""

import hashlib
import json

CONTENT = {
    "adapter/pytorch_lora_weights.safetensors": b"weights" * 1000,
    "state/optimizer.safetensors": b"moments" * 500,
    "state/empty": b"",
}


def checkpoint(step: int, attempt: int = 0, *, complete: bool = True) -> dict[str, bytes]:
    """The files of one checkpoint, by path below the run's folder."""
    folder = f"checkpoints/step-{step:010d}-attempt-{attempt:06d}"
    files = {f"{folder}/{path}": content for path, content in CONTENT.items()}
    manifest = {
        "format": 1,
        "step": step,
        "attempt": attempt,
        "nonce": "n",
        "worldSize": 1,
        "time": "2026-01-31T12:00:00Z",
        "files": [
            {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for path, content in CONTENT.items()
        ],
    }
    if complete:
        files[f"{folder}/MANIFEST.json"] = json.dumps(manifest).encode()
    return files


def run() -> dict[str, bytes]:
    """A run with three complete checkpoints, one that is not, and other things beside them."""
    return {
        **checkpoint(10),
        **checkpoint(20),
        **checkpoint(20, attempt=1),
        **checkpoint(30, complete=False),
        "checkpoints/other/MANIFEST.json": b"{}",
        "run.json": b"{}",
    }
