"""Lock-step rollout and shared forward against two plain ways to do the same work.

    OMP_NUM_THREADS=1 PYTHONPATH=sdk:trainer:. python -m benchmarks.rollout [--quick]
    OMP_NUM_THREADS=1 PYTHONPATH=sdk:trainer:. python -m benchmarks.rollout --sweep

The ways get the same start noises, noise and advantages. That their latents and gradients are
equal is checked before anything is timed; then they take turns, round by round. Times are medians
of processor seconds of one thread, which are wall seconds on a machine without other work; the
wall seconds are printed beside them.

    ours       lock-step rollout and shared forward: the product's own code
    published  one start noise at a time, its branch steps one after the other, the K draws of a
               step as a batch; training repeats the forward for each of the K draws, one such
               batch a call
    batched    the same order, but all start noises at once; training repeats the forward for each
               of the K draws, in calls of the size that training has in the product
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import digits_run
from benchmarks.nested import Branches, RepeatedForward, roll_out
from tempflow_api.v1alpha1 import Advantage, Algorithm
from tempflow_trainer import experience, loop, seeds
from tempflow_trainer.algorithm.advantages import AdvantageRule, advantages_GSK
from tempflow_trainer.data import Prompt
from tempflow_trainer.loop import Run
from tempflow_trainer.models.base import Conditioning
from tempflow_trainer.rollout import Rollouts

MOST_DIFFERENCE = 1e-5
PHASES = ("rollout", "scoring", "training")
SWEEP_ROLLOUT = (32, 64, 128, 256, 512, 1024, 4096)
SWEEP_TRAINING = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Size:
    """An epoch: prompts x start noises x draws, with or without the reference forward."""

    prompts: int
    seeds: int
    kl_coefficient: float
    draws: int = 6

    def __str__(self) -> str:
        kl = "with" if self.kl_coefficient else "without"
        return f"{self.prompts} prompts x {self.seeds} start noises x {self.draws} draws, {kl} KL"

    def algorithm(self) -> Algorithm:
        """In the words of a manifest."""
        return Algorithm(
            prompts_per_epoch=self.prompts,
            seeds_per_prompt=self.seeds,
            branches_per_seed=self.draws,
            updates_per_epoch=1,
            kl_coefficient=self.kl_coefficient,
            clip_range=3e-3,
            advantage=Advantage(epsilon=1e-2),
        )


SIZES = {
    "example": Size(4, 2, 0.0),
    "example-kl": Size(4, 2, 0.001),
    "paper-groups": Size(10, 4, 0.001),
}
TINY = Size(2, 1, 0.001)


@dataclass
class Meter:
    """What a phase of a way costs: calls and rows of the network, and seconds of every round."""

    calls: int = 0
    rows: int = 0
    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @contextmanager
    def measure(self, network: torch.nn.Module) -> Iterator[None]:
        """One round; the counts are of the last one."""
        self.calls = self.rows = 0

        def count(_module: object, _arguments: object, named: dict[str, Tensor]) -> None:
            self.calls += 1
            self.rows += len(named["hidden_states"])

        hook = network.register_forward_pre_hook(count, with_kwargs=True)
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.processor.append(time.process_time() - processor)
        self.wall.append(time.perf_counter() - wall)
        hook.remove()


@dataclass(frozen=True)
class Bench:
    """The inputs of one epoch, the same for every way."""

    run: Run
    owners: list[Prompt]
    """Prompt of every group."""
    starts_GCHW: Tensor
    conditioning: Conditioning
    noise_SGKCHW: Tensor
    advantages_GSK: Tensor

    def score(self, latents_GSKCHW: Tensor) -> Tensor:
        """Rewards of final latents; the same code for every way."""
        images = latents_GSKCHW.shape[1] * latents_GSKCHW.shape[2]
        texts = [prompt.text for prompt in self.owners for _ in range(images)]
        pictures = self.run.policy.model.decode(latents_GSKCHW.flatten(0, 2))
        return self.run.reward.total(self.run.reward.score(pictures, texts, [{}] * len(texts)))


@dataclass(frozen=True)
class Way:
    """How an epoch is computed: a rollout, and training on what it returned."""

    name: str
    roll_out: Callable[[], object]
    latents_GSKCHW: Callable[[object], Tensor]
    train: Callable[[object], None]


def prepare(size: Size) -> Bench:
    """A run as it is in the middle of training: LoRA factors that are not zero, mixed rewards."""
    run, prompts = digits_run.start(digits_run.spec_of(size.algorithm(), learning_rate=1e-12))
    run.max_grad_norm = math.inf  # gradients are compared as they are
    for name, parameter in run.tuning.parameters().items():
        parameter.data = 0.02 * seeds.normal(parameter.shape, 0, "lora", name)
    owners = [prompt for prompt in prompts[: size.prompts] for _ in range(size.seeds)]
    groups, steps = len(owners), len(run.exploration.plan(0).steps)
    rewards_GSK = seeds.normal((groups, steps, size.draws), 0, "rewards")
    ids_G = torch.tensor([prompt.id for prompt in owners])
    return Bench(
        run,
        owners,
        seeds.normal((groups, *run.latent_shape), 0, "start"),
        run.policy.model.encode([prompt.text for prompt in owners]),
        seeds.normal((steps, groups, size.draws, *run.latent_shape), 0, "noise"),
        advantages_GSK(rewards_GSK, ids_G, AdvantageRule("seed", "group", 1e-2, 5.0)),
    )


def ours(bench: Bench) -> Way:
    """The product's rollout and its update."""
    run = bench.run
    plan = run.exploration.plan(0)

    def collect() -> object:
        return run.walker.collect(
            plan, bench.starts_GCHW, bench.conditioning, lambda k: bench.noise_SGKCHW[k]
        )

    def latents(rolled: object) -> Tensor:
        assert isinstance(rolled, Rollouts)
        return rolled.latents_NCHW[rolled.image_of_GSK]

    def train(rolled: object) -> None:
        assert isinstance(rolled, Rollouts)
        learned = experience.of_rollouts(
            rolled, bench.advantages_GSK, plan, run.walker, run.exploration.weights_S(plan)
        )
        loop.update(run, learned, bench.conditioning)

    return Way("ours", collect, latents, train)


def nested(bench: Bench, name: str, *, groups_per_walk: int, rows_per_training_call: int) -> Way:
    """A plain way: so many groups walk together, and so many draws are trained together."""
    run, objective = bench.run, bench.run.objective
    repeated = RepeatedForward(
        run.walker,
        run.tuning,
        run.exploration.weights_S(run.exploration.plan(0)),
        objective.clip_range,
        objective.kl_coefficient,
    )

    def walk() -> object:
        parts = torch.arange(len(bench.starts_GCHW)).split(groups_per_walk)
        return Branches.join(
            [
                roll_out(
                    run.walker,
                    bench.starts_GCHW[part],
                    bench.conditioning.rows(part),
                    bench.noise_SGKCHW[:, part],
                )
                for part in parts
            ]
        )

    def latents(rolled: object) -> Tensor:
        assert isinstance(rolled, Branches)
        return rolled.latents_GSKCHW

    def train(rolled: object) -> None:
        assert isinstance(rolled, Branches)
        run.optimizer.zero_grad(set_to_none=False)
        repeated.backward(rolled, bench.advantages_GSK, bench.conditioning, rows_per_training_call)
        torch.nn.utils.clip_grad_norm_(run.tuning.parameters().values(), run.max_grad_norm)
        run.optimizer.step()

    return Way(name, walk, latents, train)


def ways_of(bench: Bench) -> list[Way]:
    """The three ways, in the order in which they take turns."""
    groups, draws = len(bench.starts_GCHW), bench.noise_SGKCHW.shape[2]
    return [
        ours(bench),
        nested(bench, "published", groups_per_walk=1, rows_per_training_call=draws),
        nested(
            bench,
            "batched",
            groups_per_walk=groups,
            rows_per_training_call=bench.run.rows_per_training_call,
        ),
    ]


def check_equal(bench: Bench, ways: list[Way]) -> None:
    """Latents and gradients of all ways are those of the first; prints how far they are apart.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    found = []
    for way in ways:
        rolled = way.roll_out()
        way.train(rolled)
        gradient = [p.grad for p in bench.run.tuning.parameters().values() if p.grad is not None]
        flat = torch.cat([part.flatten() for part in gradient])
        found.append((way.latents_GSKCHW(rolled), flat.clone()))
    for way, (latents, flat) in zip(ways[1:], found[1:], strict=True):
        apart = [_apart(latents, found[0][0]), _apart(flat, found[0][1])]
        print(f"  {way.name}: latents differ by {apart[0]:.1e}, gradients by {apart[1]:.1e}")
        if max(apart) > MOST_DIFFERENCE:
            raise SystemExit(f"{way.name} and ours are not the same computation")


def _apart(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


def take_turns(bench: Bench, ways: list[Way], rounds: int) -> dict[tuple[str, str], Meter]:
    """Meters by way and phase."""
    meters = {(way.name, phase): Meter() for way in ways for phase in PHASES}
    network = bench.run.policy.model.transformer
    for _ in range(rounds):
        for way in ways:
            with meters[way.name, "rollout"].measure(network):
                rolled = way.roll_out()
            with meters[way.name, "scoring"].measure(network):
                bench.score(way.latents_GSKCHW(rolled))
            with meters[way.name, "training"].measure(network):
                way.train(rolled)
    return meters


def limit_against(size: Size, bench: Bench) -> float:
    """Ratio of network evaluations without and with the shared forward, backward as two."""
    states = len(bench.run.exploration.plan(0).steps)
    trained = states * (4 if size.kl_coefficient else 3)
    rollout = bench.run.exploration.plan(0).rollout_evaluations
    return (rollout + size.draws * trained) / (rollout + trained)


def report(size: Size, bench: Bench, ways: list[Way], rounds: int) -> None:
    """A table in Markdown."""
    meters = take_turns(bench, ways, rounds)
    print("\n| phase | " + " | ".join(f"{way.name}: calls, rows, s" for way in ways), end="")
    print(" | published / ours | batched / ours |\n|" + "---|" * (len(ways) + 3))
    for phase in (*PHASES, "epoch"):
        parts = PHASES if phase == "epoch" else (phase,)
        cells, seconds, wall = [], [], []
        for way in ways:
            of_way = [meters[way.name, part] for part in parts]
            seconds.append(_median_of_sums([meter.processor for meter in of_way]))
            wall.append(_median_of_sums([meter.wall for meter in of_way]))
            calls, rows = sum(m.calls for m in of_way), sum(m.rows for m in of_way)
            cells.append(f"{calls:,}, {rows:,}, {seconds[-1]:.3f} (wall {wall[-1]:.3f})")
        ratios = [f"{seconds[i] / seconds[0]:.2f}x (wall {wall[i] / wall[0]:.2f}x)" for i in (1, 2)]
        print(f"| {phase} | " + " | ".join([*cells, *ratios]) + " |")
    limit = limit_against(size, bench)
    print(f"\nby evaluations alone (backward as two) the epoch's limit is {limit:.2f}x")


def _median_of_sums(by_part: list[list[float]]) -> float:
    sums: list[float] = [sum(part) for part in zip(*by_part, strict=True)]
    return statistics.median(sums)


def compare(size: Size, rounds: int) -> None:
    """Check, then time."""
    print(f"\n## {size}; {rounds} rounds")
    bench = prepare(size)
    ways = ways_of(bench)
    check_equal(bench, ways)
    report(size, bench, ways, rounds)


def sweep(size: Size, rounds: int) -> None:
    """Processor seconds of the product's own rollout and update, by rows a call."""
    print(f"\n## rows a call, {size}; {rounds} rounds")
    bench = prepare(size)
    walker = bench.run.walker
    network = bench.run.policy.model.transformer
    rollouts = {rows: Meter() for rows in SWEEP_ROLLOUT}
    updates = {rows: Meter() for rows in SWEEP_TRAINING}
    for _ in range(rounds):
        for rows, meter in rollouts.items():
            bench.run.walker = replace(walker, rows_per_call=rows)
            with meter.measure(network):
                rolled = ours(bench).roll_out()
        for rows, meter in updates.items():
            bench.run.rows_per_training_call = rows
            with meter.measure(network):
                ours(bench).train(rolled)
    for title, meters in (("rowsPerCall", rollouts), ("rowsPerTrainingCall", updates)):
        print(f"\n| {title} | calls | s |\n|---|---|---|")
        for rows, meter in meters.items():
            print(f"| {rows} | {meter.calls} | {statistics.median(meter.processor):.3f} |")


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one tiny epoch: does it work?")
    parser.add_argument("--sweep", action="store_true", help="choose the rows of a call")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of")
    parser.add_argument("--size", choices=SIZES, help="one size of epoch, not all")
    arguments = parser.parse_args()
    sizes = [SIZES[arguments.size]] if arguments.size else list(SIZES.values())
    for size in [TINY] if arguments.quick else sizes:
        (sweep if arguments.sweep else compare)(size, arguments.rounds)


if __name__ == "__main__":
    main()
