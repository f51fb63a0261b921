"""What shorter tails save, whether they rank draws alike, and what is learned with them.

    OMP_NUM_THREADS=1 PYTHONPATH=sdk:trainer:. python -m benchmarks.tail [--seeds N] [--epochs N]

On the digits model with T = 10, branches at steps 0 to 8. First the same draws are completed by
every tail: Spearman's correlation of their rewards with those of exact tails, within each (prompt,
seed, step) group, averaged. Then every tail trains from scratch: evaluated after as many epochs as
the exact tail, and after as many evaluations of the network (forward one, backward two).
"""

import argparse
import os
import statistics
from dataclasses import dataclass

from torch import Tensor

from benchmarks import digits_run
from benchmarks.learning_runs import EVALUATION_SEED, evaluations_of
from benchmarks.methods import METHODS, Epoch
from tempflow_api.v1alpha1 import JobSpec
from tempflow_api.v1alpha1 import Tail as TailSpec
from tempflow_trainer import seeds
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.loop import run_epoch
from tempflow_trainer.main import evaluator_of

EPOCH = Epoch(prompts=4, seeds=2, draws=6)
LEARNING_RATE = 1e-2
RANKED_SEEDS = 4
IMAGES_PER_PROMPT = 16


@dataclass(frozen=True)
class Way:
    """A row of the table."""

    label: str
    tail: TailSpec


WAYS = (
    Way("all steps (exact)", TailSpec()),
    Way("euler, at most 4", TailSpec(steps=4)),
    Way("euler, at most 3", TailSpec(steps=3)),
    Way("euler, at most 2", TailSpec(steps=2)),
    Way("euler, 1", TailSpec(steps=1)),
    Way("dpm2, all steps", TailSpec(solver="dpm2")),
    Way("dpm2, at most 4", TailSpec(solver="dpm2", steps=4)),
    Way("dpm2, at most 3", TailSpec(solver="dpm2", steps=3)),
)


def spec_of(way: Way, seed: int) -> JobSpec:
    """TempFlow-GRPO as `benchmarks/learning.py` runs it, with another tail."""
    spec = digits_run.spec_of(METHODS["tempflow"].algorithm(EPOCH, seed), LEARNING_RATE)
    sampling = spec.sampling.model_copy(update={"tail": way.tail})
    return spec.model_copy(update={"sampling": sampling})


def rewards_GSK(way: Way) -> Tensor:
    """Of the untrained model's draws: the same draws whatever completes them."""
    run, prompts = digits_run.start(spec_of(way, 0))
    plan = run.exploration.plan(0)
    owners = [prompt for prompt in prompts for _ in range(RANKED_SEEDS)]
    shape = (len(owners), plan.draws, *run.latent_shape)
    rolled = run.walker.collect(
        plan,
        seeds.normal((len(owners), *run.latent_shape), 0, "start"),
        run.policy.model.encode([prompt.text for prompt in owners]),
        lambda k: seeds.normal(shape, 0, "noise", k),
    )
    assert run.policy.evaluations["rollout"] == len(owners) * plan.rollout_evaluations
    texts = [owner.text for owner in owners for _ in range(plan.images_per_group)]
    images = run.policy.model.decode(rolled.latents_NCHW)
    return rolled.rewards_GSK(run.reward.total(run.reward.score(images, texts, [{}] * len(texts))))


def rank_correlation(one_GSK: Tensor, other_GSK: Tensor) -> Tensor:
    """Spearman's, within each group; mean over the groups by step, [S]."""
    ranks = [rewards.argsort(dim=2).argsort(dim=2).double() for rewards in (one_GSK, other_GSK)]
    centred = [rank - rank.mean(dim=2, keepdim=True) for rank in ranks]
    product = (centred[0] * centred[1]).sum(dim=2)
    norms = centred[0].square().sum(dim=2).sqrt() * centred[1].square().sum(dim=2).sqrt()
    return (product / norms).mean(dim=0)


def plan_of(way: Way) -> BranchPlan:
    """The same in every epoch."""
    run, _ = digits_run.start(spec_of(way, 0))
    return run.exploration.plan(0)


def cost(way: Way) -> int:
    """Evaluations of an epoch, one start noise: rollout, and training as three."""
    plan = plan_of(way)
    return plan.rollout_evaluations + 3 * plan.rows_per_group


def learn(way: Way, seed: int, epochs: int, same_cost: int) -> tuple[list[float], list[float]]:
    """Reward and judge after ``epochs`` epochs and after the ``same_cost``-th."""
    spec = spec_of(way, seed)
    run, prompts = digits_run.start(spec)
    spec = spec.model_copy(
        update={
            "evaluation": spec.evaluation.model_copy(
                update={"images_per_prompt": IMAGES_PER_PROMPT}
            ),
            "algorithm": spec.algorithm.model_copy(update={"seed": EVALUATION_SEED}),
        }
    )
    evaluator = evaluator_of(spec, run, prompts)
    rewards, judges = [], []
    for epoch in range(max(epochs, same_cost)):
        run_epoch(run, epoch)
        if epoch + 1 in (epochs, same_cost):
            found = evaluator.run()
            rewards.append(float(found.total.mean()))
            judges.append(float(found.scores["digit-judge"].mean()))
    groups = EPOCH.prompts * EPOCH.seeds
    assert evaluations_of(run) == max(epochs, same_cost) * groups * cost(way)
    return [rewards[0], rewards[-1]], [judges[0], judges[-1]]


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    exact_GSK, exact_cost = rewards_GSK(WAYS[0]), cost(WAYS[0])
    print(
        "| tail | rollout evaluations | by step 0, 1, ... 8 | rank correlation |\n|---|---|---|---|"
    )
    for way in WAYS:
        by_step_S = rank_correlation(rewards_GSK(way), exact_GSK)
        steps = " ".join(f"{value:.2f}" for value in by_step_S.tolist())
        rollout = plan_of(way).rollout_evaluations
        print(f"| {way.label} | {rollout} | {steps} | {float(by_step_S.mean()):.3f} |", flush=True)
    print(
        f"\n| tail | epochs at equal cost | reward after {arguments.epochs} epochs | judge "
        "| reward at equal cost | judge |\n|---|---|---|---|---|---|"
    )
    for way in WAYS:
        same_cost = round(arguments.epochs * exact_cost / cost(way))
        runs = [
            learn(way, seed, arguments.epochs, same_cost) for seed in range(1, arguments.seeds + 1)
        ]
        cells = []
        for at in (0, 1):
            for kind in (0, 1):
                values = [run[kind][at] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {way.label} | {same_cost} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
