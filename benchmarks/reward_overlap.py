"""What an epoch takes with a served reward that needs half of the sampling time.

    OMP_NUM_THREADS=1 PYTHONPATH=sdk:trainer:. python -m benchmarks.reward_overlap

The digits model draws; the reward sleeps on a server of its own, so long that scoring with encoding
and sending takes half as long as the rollout. Three ways take turns: no reward to wait for, scored
after the rollout (all groups at once), scored beside it (an eighth of the groups at a time).
Medians of wall seconds.

A row of the network also sleeps, as if it were computed on a device: this process then has a
processor free, as one with a GPU has. With --milliseconds-per-row 0 the network and the sending
share one interpreter, and most of scoring is sending.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import digits_run
from benchmarks.reward_server import serving
from tempflow_api.v1alpha1 import Algorithm, RewardService, RewardTerm
from tempflow_trainer import loop
from tempflow_trainer.loop import Run
from tempflow_trainer.rewards import registry

REWARD = "benchmarks.sleeping_reward:Sleeping"
PARTS = 8
SHARE = 0.5


def run_of(prompts: int) -> Run:
    """A run of prompts x 4 start noises x 6 draws."""
    algorithm = Algorithm(
        prompts_per_epoch=prompts,
        seeds_per_prompt=4,
        branches_per_seed=6,
        updates_per_epoch=1,
        kl_coefficient=0.0,
        clip_range=3e-3,
    )
    run, _ = digits_run.start(digits_run.spec_of(algorithm, 1e-6))
    free = registry.build([RewardTerm(name="free", uses=REWARD)])
    return replace(run, reward=free)


def epoch(run: Run) -> tuple[float, dict[str, float], float]:
    """Wall seconds, those by phase, and the mean reward."""
    before, hidden = dict(run.clock.seconds), run.clock.hidden.get("scoring", 0.0)
    start = time.perf_counter()
    metrics = loop.run_epoch(run, 0)
    seconds = time.perf_counter() - start
    phases = run.clock.since(before)
    phases["hidden"] = run.clock.hidden.get("scoring", 0.0) - hidden
    return seconds, phases, metrics["reward"]


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--milliseconds-per-row", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = still(run_of(arguments.prompts))
    slow_down(run, arguments.milliseconds_per_row / 1000)
    groups = arguments.prompts * 4
    images = groups * run.exploration.plan(0).images_per_group
    each = _seconds_per_image(run, images)
    print(f"{groups} groups, {images} images, {each * 1000:.2f} ms an image on the server")
    with serving(REWARD, "--set", f"seconds_per_image={each!r}") as (url, _):
        service = RewardService(endpoints=[url])
        served = registry.build([RewardTerm(name="served", uses=REWARD, service=service)])
        ways = {
            "no reward": run,
            "after": replace(run, reward=served),
            "beside": replace(run, reward=served, groups_per_rollout=-(-groups // PARTS)),
        }
        found: dict[str, list[tuple[float, dict[str, float], float]]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                found[name].append(epoch(way))
    base = statistics.median(seconds for seconds, _, _ in found["no reward"])
    for name, rounds in found.items():
        seconds = statistics.median(seconds for seconds, _, _ in rounds)
        parts = {
            phase: round(statistics.median(r[1].get(phase, 0.0) for r in rounds), 2)
            for phase in ("rollout", "scoring", "hidden", "update")
        }
        print(f"{name:10} {seconds:6.2f} s  {seconds / base:5.2f}x  {parts}")


def _seconds_per_image(run: Run, images: int) -> float:
    """What the server has to sleep, so that scoring with all that belongs to it, encoding and
    sending, takes its share of the rollout."""
    epoch(run)
    with serving(REWARD) as (url, _):
        service = RewardService(endpoints=[url])
        quick = registry.build([RewardTerm(name="quick", uses=REWARD, service=service)])
        _, phases, _ = epoch(replace(run, reward=quick))
    return max(0.0, SHARE * phases["rollout"] - phases["scoring"]) / images


def slow_down(run: Run, seconds_per_row: float) -> None:
    """Let a device compute: the caller waits, and does not work."""
    model = run.policy.model
    velocity = model.velocity

    def waited(latents: Tensor, *others: Any) -> Tensor:
        time.sleep(seconds_per_row * len(latents))
        return velocity(latents, *others)

    model.velocity = waited  # type: ignore[method-assign, assignment]


def still(run: Run) -> Run:
    """The run with an optimizer that moves nothing: every epoch is the same one."""
    parameters = list(run.tuning.parameters().values())
    return replace(run, optimizer=torch.optim.SGD(parameters, lr=0.0))


if __name__ == "__main__":
    main()
