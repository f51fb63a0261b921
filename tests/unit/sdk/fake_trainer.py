"""A trainer that trains nothing: a real process with the behaviour named by its argument.

It needs the standard library only, so it starts in milliseconds.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORK = Path(os.environ["TEMPFLOW_WORK_DIR"])
JOB = json.loads(Path(os.environ["TEMPFLOW_JOB_FILE"]).read_text())
EPOCHS = JOB["spec"]["algorithm"]["epochs"]
SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


def record(name: str, content: object, *, append: bool = False) -> None:
    path = WORK / "record" / name
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content)
    if append:
        with path.open("a") as file:
            file.write(f"{text}\n")
    else:
        aside = path.with_suffix(".aside")
        aside.write_text(text)
        aside.replace(path)


def progress(epoch: int, phase: str) -> None:
    record(
        "progress.json",
        {
            "epoch": epoch,
            "epochs": EPOCHS,
            "phase": phase,
            "imagesPerSecond": 200.0,
            "etaSeconds": float(EPOCHS - epoch),
            "checkpointEpoch": epoch,
            "time": "2026-01-31T12:00:00Z",
        },
    )


def epoch(number: int) -> None:
    record(
        "metrics.jsonl",
        {
            "epoch": number,
            "time": "2026-01-31T12:00:00Z",
            "reward": -2.0 + number / 4,
            "rewardStd": 0.5,
            "rewards": {"digit-ink": -0.25},
            "advantageZeroShare": 0.0,
            "loss": 0.0,
            "kl": 0.0,
            "ratioClippedShare": 0.0,
            "ratioDrift": 0.0,
            "gradNorm": 0.01,
            "images": 160,
            "imagesPerSecond": 200.0,
            "seconds": {"rollout": 0.5, "scoring": 0.1, "update": 0.2},
            "evaluations": {"rollout": 279, "training": 36, "reference": 0},
        },
        append=True,
    )
    progress(number, "rollout")


def evaluation(number: int, reward: float) -> None:
    record(
        "evaluations.jsonl",
        {
            "epoch": number,
            "time": "2026-01-31T12:00:00Z",
            "rewardStd": 0.1,
            "rewards": {"digit-ink": {"mean": reward, "std": 0.1}},
            "reward": reward,
            "diversity": 0.3,
            "images": 8,
            "grid": None,
        },
        append=True,
    )


def summary() -> None:
    record(
        "summary.json",
        {
            "epochs": EPOCHS,
            "rewardBefore": {"mean": -2.0, "std": 0.5},
            "rewardAfter": {"mean": -1.0, "std": 0.25},
            "rewards": {"digit-ink": {"before": -0.5, "after": -0.125}},
            "diversity": {"before": 0.34, "after": 0.29},
            "evaluations": 71400,
            "images": 21600,
            "seconds": {
                "total": 63.2,
                "rollout": 40.0,
                "scoring": 2.0,
                "update": 15.0,
                "evaluation": 5.0,
                "checkpoint": 1.0,
            },
            "peakMemoryBytes": 640_000_000,
            "result": str(WORK / "checkpoints/step-0000000004-attempt-000000"),
        },
    )


def train() -> int:
    print("training", flush=True)
    evaluation(0, -2.0)
    first = 1
    if (WORK / "record/metrics.jsonl").exists():
        first = len((WORK / "record/metrics.jsonl").read_text().splitlines()) + 1
    for number in range(first, EPOCHS + 1):
        epoch(number)
    evaluation(EPOCHS, -1.0)
    progress(EPOCHS, "done")
    summary()
    return 0


def fail() -> int:
    print("error: an earlier one", flush=True)
    print("Traceback (most recent call last):\n  somewhere", file=sys.stderr, flush=True)
    print("error: the loss is not finite at epoch 2", flush=True)
    print("bye", flush=True)
    return 83


def fail_silently() -> int:
    return 3


def fail_without_a_log() -> int:
    return 88


def stop_on_request() -> int:
    """Two epochs, then wait for SIGTERM and leave as the trainer does."""
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    epoch(1)
    epoch(2)
    while not stopping:
        time.sleep(0.01)
    progress(2, "checkpoint")
    return 85


def stop_too_late() -> int:
    """An epoch, then wait for SIGTERM and leave as the trainer does that had to be killed."""
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    epoch(1)
    while not stopping:
        time.sleep(0.01)
    sys.stderr.write("error: killed before it could stop\n")
    return 128 + signal.SIGTERM


def ignore_requests() -> int:
    """Deaf to SIGTERM, as is a worker in a session of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen(SLEEPER, start_new_session=True)
    (WORK / "pids").write_text(f"{os.getpid()} {worker.pid}")
    epoch(1)
    time.sleep(60)
    return 0


def die_with_a_child_left() -> int:
    worker = subprocess.Popen(SLEEPER)
    (WORK / "pids").write_text(f"{worker.pid}")
    return 1


def be_killed() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def report_environment() -> int:
    names = sorted(name for name in os.environ if name.startswith("TEMPFLOW_"))
    (WORK / "environment.json").write_text(json.dumps({name: os.environ[name] for name in names}))
    (WORK / "session").write_text(str(os.getsid(0) == os.getpid()))
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]]())
