"""What a checkpoint costs: the stall of training, and the transfer against boto3's own.

    python -m benchmarks.checkpoint

What is trained has the names and sizes of the preset ``sd35m-pickscore``, a LoRA of rank 32 on
SD3.5 Medium, with random values. The store is SeaweedFS on this machine, so both sides of a
transfer share its processors: ratios mean something, megabytes a second do not. Ours and boto3's
transfers take turns.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import boto3
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.flops import PEAK_TFLOPS
from tempflow import manifest, presets
from tempflow_api import checkpoint_layout as layout
from tempflow_api.retention import Retention
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tempflow_trainer.checkpoint import Checkpoints, State, snapshot
from tempflow_trainer.explain import explain
from tempflow_trainer.main import tuning_of
from tempflow_trainer.models.skeleton import skeleton
from tempflow_trainer.saving import Save, Saver
from tempflow_trainer.store import S3Store
from tests.faults.seaweedfs import seaweedfs

ROOT = Path(__file__).parents[1]
BUCKET = "runs"
PRESET = "sd35m-pickscore"
UTILISATION = 0.4
"""Share of an H100's peak that a good run reaches, as docs/explain.md says."""


def preset_job() -> TempFlowGRPOJob:
    return manifest.parse_text(presets.preset(PRESET).text, PRESET, []).job


class Trained:
    """Weights, average and optimizer, as a run of the preset has them; here in memory."""

    def __init__(self) -> None:
        spec = preset_job().spec
        shapes = {
            name: value.shape
            for name, value in tuning_of(spec, skeleton(spec.model).model).parameters().items()
        }
        generator = torch.Generator().manual_seed(0)

        def drawn() -> dict[str, Tensor]:
            return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}

        self.weights = {name: nn.Parameter(value) for name, value in drawn().items()}
        self.average = drawn()
        self.optimizer = torch.optim.AdamW(self.weights.values())
        for parameter, gradient in zip(self.weights.values(), drawn().values(), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.weights.values())

    def copy(self, step: int) -> tuple[State, Callable[[Path], None]]:
        state = State(step, step, *snapshot(self.weights, self.average, self.optimizer), {})

        def export(folder: Path) -> None:
            (folder / layout.ADAPTER).mkdir()
            save_file(state.average, folder / layout.ADAPTER / "pytorch_lora_weights.safetensors")

        return state, export


def stall(run: Checkpoints, trained: Trained, rounds: int) -> tuple[list[float], list[Save]]:
    """Seconds that each save keeps the training, which has none in flight; and the saves."""
    ended: list[Save] = []
    saver = Saver(
        run,
        wait_seconds=600,
        most_failures=1,
        on_end=ended.append,
        write=lambda _line: None,
        after=lambda: None,
    )
    seconds = []
    for step in range(1, rounds + 1):
        start = time.perf_counter()
        saver.ready(step)
        saver.begin(*trained.copy(step), {})
        seconds.append(time.perf_counter() - start)
        saver.settle(600)
    return seconds, ended


def expected_epoch_seconds(utilisation: float) -> float:
    """Of the preset on its H100s, as ``tempflow explain`` works it out of the operations."""
    rate = f"{PEAK_TFLOPS['H100'] * utilisation:g}TFLOP/s"
    seconds = explain(preset_job(), rate).seconds
    assert seconds is not None
    return seconds.total


def digits(folder: Path) -> tuple[list[float], list[float]]:
    """Seconds that training stood still for each save of a real run, and those of its epochs."""
    settings = {"algorithm.epochs": 10, "checkpoint.everyEpochs": 1, "evaluation.everyEpochs": 100}
    given = [word for k, v in settings.items() for word in ("--set", f"spec.{k}={v}")]
    command = [sys.executable, "-m", "tempflow", "run", str(ROOT / "examples/digits.yaml")]
    subprocess.run(
        [*command, "--work-dir", str(folder), "--plain", *given],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (record,) = folder.glob(f"*/{layout.RECORD}")
    saves, epochs = (
        [json.loads(line) for line in (record.parent / file).read_text().splitlines()]
        for file in (layout.SAVES, layout.METRICS)
    )
    stalls = [save["stallSeconds"] for save in saves]
    return stalls, [sum(epoch["seconds"].values()) for epoch in epochs]


def lost_beside(start: Callable[[], None], going: Callable[[], bool]) -> tuple[float, float]:
    """Share of a loop's speed that is lost while something else goes on, and for how long.

    The loop is what a training process does while its GPU computes: start small operations from
    Python.
    """
    values = torch.ones(64, 64)

    def rate(seconds: float, going: Callable[[], bool]) -> float:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds and going():
            for _ in range(20):
                values.add(1).sum()
            count += 1
        return count / (time.perf_counter() - began)

    alone = rate(2, lambda: True)
    start()
    began = time.perf_counter()
    beside = rate(600, going)
    seconds = time.perf_counter() - began
    return 1 - beside / max(alone, rate(2, lambda: True)), seconds


def beside_thread(run: Checkpoints, trained: Trained, step: int) -> tuple[float, float]:
    """What a save in a thread of the training process takes away."""
    state, export = trained.copy(step)
    thread = threading.Thread(target=run.save, args=(state, export))
    return lost_beside(thread.start, thread.is_alive)


def save_elsewhere(endpoint: str, staging: Path, ready: Event, go: Event) -> None:
    """The same save in a process that does nothing else."""
    staging.mkdir()
    store = S3Store(f"s3://{BUCKET}/other", endpoint_url=endpoint, region="us-east-1")
    run = Checkpoints(store, staging, 1, world_size=1, retention=Retention(2))
    run.begin()
    state, export = Trained().copy(1)
    ready.set()
    go.wait()
    run.save(state, export)


def beside_process(endpoint: str, staging: Path) -> tuple[float, float]:
    """What a save in another process takes away: the machine's processors, and no lock."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=save_elsewhere, args=(endpoint, staging, ready, go))
    process.start()
    ready.wait()
    found = lost_beside(go.set, process.is_alive)
    process.join()
    return found


def transfers(
    run: Checkpoints, trained: Trained, endpoint: str, folder: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round: ours and boto3's, the same files; and of their digests alone."""
    client = boto3.client("s3", endpoint_url=endpoint)
    seconds: dict[str, list[float]] = {
        name: [] for name in ("save", "boto3 up", "load", "boto3 down", "digests")
    }

    def timed(name: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        seconds[name].append(time.perf_counter() - start)

    state, export = trained.copy(0)
    with run.staged(state, export) as staged:
        files = [file.path for file in staged.files]
        for _ in range(rounds):
            timed("save", lambda: run.send(staged, {}))
            timed(
                "boto3 up",
                lambda: [
                    client.upload_file(str(staged.local / path), BUCKET, f"plain/{path}")
                    for path in files
                ],
            )
    newest = f"{layout.CHECKPOINTS}/{run.committed()[0].name}"
    target = folder / "down"
    target.mkdir()
    loaded = [path for path in files if path.startswith(layout.STATE)]
    for _ in range(rounds):
        timed("load", lambda: run.load(newest))
        timed(
            "boto3 down",
            lambda: [
                client.download_file(BUCKET, f"plain/{path}", str(target / Path(path).name))
                for path in loaded
            ],
        )
        timed("digests", lambda: [digest(target / Path(path).name) for path in loaded])
    return seconds


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    keys = {"accessKey": "test", "secretKey": "testtest"}
    os.environ |= {
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with seaweedfs(folder, keys, BUCKET) as endpoint:
            report(folder, endpoint, rounds)
    return 0


def report(folder: Path, endpoint: str, rounds: int) -> None:
    staging = folder / "staging"
    staging.mkdir()
    store = S3Store(f"s3://{BUCKET}/run", endpoint_url=endpoint, region="us-east-1")
    run = Checkpoints(store, staging, 1, world_size=1, retention=Retention(2))
    run.begin()
    trained = Trained()
    waits, saves = stall(run, trained, rounds)
    megabytes = saves[0].bytes / 1e6
    print(f"{trained.parameters / 1e6:.1f} million parameters, {megabytes:.0f} MB a checkpoint")
    waited, spread = statistics.median(waits), f"{min(waits):.3f} to {max(waits):.3f}"
    print(f"stall of training      {waited:.3f} s ({spread})")
    for utilisation in (UTILISATION, 1.0):
        epoch = expected_epoch_seconds(utilisation)
        print(
            f"{'':22} {waited / epoch:.2%} of an epoch of {epoch:.1f} s, which {PRESET} takes at "
            f"{utilisation:.0%} of an H100's peak"
        )
    stalls, epochs = digits(folder / "digits")
    share = [stalled / epoch for stalled, epoch in zip(stalls, epochs, strict=True)]
    print(
        f"stall of digits        {statistics.median(stalls):.4f} s, epoch "
        f"{statistics.median(epochs):.2f} s: {statistics.median(share):.2%} "
        f"({min(share):.2%} to {max(share):.2%})"
    )
    stage = statistics.median(save.stage_seconds for save in saves)
    send = statistics.median(save.send_seconds for save in saves)
    print(f"beside the training    {stage:.2f} s to local disk with SHA-256, {send:.2f} s to S3")
    threads = [beside_thread(run, trained, rounds + 1 + n) for n in range(rounds)]
    processes = [beside_process(endpoint, folder / f"other-{n}") for n in range(rounds)]
    for where, measured in (("a thread", threads), ("a process", processes)):
        lost = statistics.median(share for share, _ in measured)
        seconds = statistics.median(seconds for _, seconds in measured)
        print(f"saved in {where:14} a loop in Python is {lost:.0%} slower for {seconds:.1f} s")
    found = transfers(run, trained, endpoint, folder, rounds)
    for ours, theirs in (("save", "boto3 up"), ("load", "boto3 down")):
        mine, other = statistics.median(found[ours]), statistics.median(found[theirs])
        each = sorted(b / a for a, b in zip(found[ours], found[theirs], strict=True))
        print(
            f"{ours:22} {mine:.2f} s, boto3 {other:.2f} s: {other / mine:.0%} of its speed "
            f"({each[0]:.0%} to {each[-1]:.0%})"
        )
    hashing = statistics.median(found["digests"])
    print(f"{'of the load':22} {hashing:.2f} s is what SHA-256 of the files takes alone")


if __name__ == "__main__":
    sys.exit(main())
