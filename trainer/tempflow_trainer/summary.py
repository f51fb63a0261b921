"""What a run did, in one object, for people and programs that come later."""

import resource
import sys

import torch

from tempflow_api.record import BeforeAfter, Evaluation, RunSeconds, Spread, Summary


def summarise(
    evaluations: list[Evaluation],
    totals: dict[str, float],
    epochs_done: int,
    result: str,
    memory_bytes: int,
) -> Summary:
    """Compare the first and the last evaluation, and add up what the run took."""
    first, last = evaluations[0], evaluations[-1]
    seconds = _below("seconds.", totals)
    diversity = None
    if first.diversity is not None and last.diversity is not None:
        diversity = BeforeAfter(before=first.diversity, after=last.diversity)
    return Summary(
        epochs=epochs_done,
        reward_before=Spread(mean=first.reward, std=first.reward_std),
        reward_after=Spread(mean=last.reward, std=last.reward_std),
        rewards={
            name: BeforeAfter(before=first.rewards[name].mean, after=spread.mean)
            for name, spread in last.rewards.items()
            if name in first.rewards
        },
        diversity=diversity,
        evaluations=int(sum(_below("evaluations.", totals).values())),
        images=int(totals["images"]),
        seconds=RunSeconds(total=sum(seconds.values()), **seconds),
        peak_memory_bytes=memory_bytes,
        result=result,
    )


def peak_memory_bytes() -> int:
    """Most memory that this process has used: on the GPU if it computes there."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _below(prefix: str, totals: dict[str, float]) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in totals.items() if k.startswith(prefix)}
