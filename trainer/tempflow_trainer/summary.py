"""What a run did, in one object, for people and programs that come later."""

import resource
import sys

import torch

from tempflow_trainer.metrics import Row


def summarise(
    evaluations: list[Row], totals: dict[str, float], epochs_done: int, result: str | None
) -> Row:
    """Compare the first and the last evaluation, and add up what the run took."""
    first, last = evaluations[0], evaluations[-1]
    seconds = _below("seconds.", totals)
    return {
        "epochs": epochs_done,
        "rewardBefore": {"mean": first["reward"], "std": first["rewardStd"]},
        "rewardAfter": {"mean": last["reward"], "std": last["rewardStd"]},
        "rewards": {
            name: {"before": first["rewards"][name]["mean"], "after": value["mean"]}
            for name, value in last["rewards"].items()
        },
        "diversity": {"before": first["diversity"], "after": last["diversity"]},
        "evaluations": int(sum(_below("evaluations.", totals).values())),
        "images": int(totals["images"]),
        "seconds": {"total": sum(seconds.values()), **seconds},
        "peakMemoryBytes": peak_memory_bytes(),
        "result": result,
        "checkpoint": result,
    }


def peak_memory_bytes() -> int:
    """Most memory that this process has used: on the GPU if it computes there."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _below(prefix: str, totals: dict[str, float]) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in totals.items() if k.startswith(prefix)}
