"""The runs of `benchmarks/learning.py`: which there are, one in a process, and their file."""

import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch

from benchmarks import digits_run
from benchmarks.methods import CONTROL, METHODS, Epoch
from tempflow_api.errors import TrainingDiverged
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer.evaluation import Evaluator
from tempflow_trainer.loop import Run, run_epoch
from tempflow_trainer.main import evaluator_of

Line = dict[str, Any]
QUARTERS = (0.25, 0.5, 0.75, 1.0)
EVALUATION_SEED = 20_260
BUDGETS = ("evaluations", "seconds")


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    epochs: int
    """Of TempFlow-GRPO; the other methods get what costs the same."""
    epoch: Epoch
    learning_rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    images_per_prompt: int
    timing_rounds: int
    results: str
    plot: str
    document: str | None
    """Where the tables are written into; None prints them only."""


@dataclass(frozen=True)
class Task:
    """One training run, evaluated after some of its epochs."""

    method: str
    learning_rate: float
    seed: int
    evaluate_after: tuple[int, ...]
    epoch: Epoch
    images_per_prompt: int
    model: str
    """Digest of the model that the benchmark began with."""

    @property
    @functools.cache  # noqa: B019 - some dozens of tasks, each asked for thousands of times
    def key(self) -> str:
        """Names the task and what the benchmark itself sets.

        Not the whole specification: a field that the API gets later would rename every result.
        """
        run_spec = spec_of(self).model_dump_json(exclude_unset=True)
        text = json.dumps([run_spec, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def spec_of(task: Task) -> JobSpec:
    """The job of a task."""
    method = (METHODS | CONTROL)[task.method]
    return digits_run.spec_of(method.algorithm(task.epoch, task.seed), task.learning_rate)


def start(task: Task) -> tuple[Run, Evaluator]:
    """The run, and an evaluation on the noise that all runs are evaluated on."""
    spec = spec_of(task)
    run, prompts = digits_run.start(spec)
    (METHODS | CONTROL)[task.method].adapt(run, task.epoch)
    evaluator = replace(
        evaluator_of(spec, run, prompts),
        run_seed=EVALUATION_SEED,
        images_per_prompt=task.images_per_prompt,
    )
    return run, evaluator


def point(run: Run, evaluator: Evaluator, epoch: int, seconds: float) -> Line:
    """What is measured after ``epoch`` epochs that took ``seconds``."""
    found = evaluator.run()
    return {
        "epoch": epoch,
        "reward": float(found.total.mean()),
        **{name: float(values.mean()) for name, values in found.scores.items()},
        "diversity": found.diversity,
        "evaluations": evaluations_of(run),
        "seconds": seconds,
    }


def evaluations_of(run: Run) -> int:
    """Forward one, backward two; evaluations of the result are not counted."""
    counted = run.policy.evaluations
    return counted["rollout"] + counted["reference"] + 3 * counted["training"]


def work(task: Task) -> Line:
    """Train; a run that diverges ends there."""
    if digits_run.model_digest() != task.model:
        raise RuntimeError("the shipped model has changed: start the benchmark again")
    run, evaluator = start(task)
    points: list[Line] = []
    seconds = 0.0
    diverged = False
    for epoch in range(max(task.evaluate_after)):
        before = time.process_time()
        try:
            run_epoch(run, epoch)
        except TrainingDiverged:
            diverged = True
            break
        seconds += time.process_time() - before
        if epoch + 1 in task.evaluate_after:
            points.append(point(run, evaluator, epoch + 1, seconds))
    return {"key": task.key, "task": asdict(task), "points": points, "diverged": diverged}


@dataclass
class Results:
    """A file of JSON lines by key."""

    path: Path

    def __post_init__(self) -> None:
        self.lines: dict[str, Line] = {}
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    line: Line = json.loads(text)
                except json.JSONDecodeError:  # a line that a kill left unfinished
                    continue
                self.lines[line["key"]] = line

    def add(self, line: Line) -> None:
        """Keep it, on disk first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines[line["key"]] = line


@dataclass(frozen=True)
class Benchmark:
    """The three stages, on what is there already."""

    scale: Scale
    results: Results
    model: str

    def task(self, method: str, rate: float, seed: int, after: Iterable[int]) -> Task:
        """A task of this benchmark."""
        scale = self.scale
        epochs = tuple(sorted(set(after)))
        return Task(method, rate, seed, epochs, scale.epoch, scale.images_per_prompt, self.model)

    @property
    def timing_key(self) -> str:
        keys = [self.task(m, 1e-3, 0, [1]).key for m in METHODS]
        return "timing-" + hashlib.sha256("".join(keys).encode()).hexdigest()[:16]

    def timing(self) -> Line:
        """Seconds and evaluations of an epoch by method; measured if it has not been."""
        if self.timing_key not in self.results.lines:
            self.results.add(self._measure_epochs())
        return self.results.lines[self.timing_key]

    def _measure_epochs(self) -> Line:
        runs = {name: start(self.task(name, 1e-3, 0, [1])) for name in METHODS}
        base = point(*runs["tempflow"], 0, 0.0)
        evaluations, seconds = {}, {name: [0.0] for name in runs}
        for number in range(self.scale.timing_rounds + 1):  # the first warms up
            for name, (run, _) in runs.items():
                counted, before = evaluations_of(run), time.process_time()
                run_epoch(run, number)
                seconds[name].append(time.process_time() - before)
                evaluations[name] = evaluations_of(run) - counted
        median = {name: statistics.median(found[2:]) for name, found in seconds.items()}
        return {
            "key": self.timing_key,
            "base": base,
            "evaluations": evaluations,
            "seconds": median,
            "torch": torch.__version__,
        }

    def quarters(self, method: str, budget: str) -> list[int]:
        """Epochs at which ``method`` has used a quarter, half, ... of ``budget``."""
        cost = self.timing()[budget]
        like = "tempflow" if method in CONTROL else method
        total = self.scale.epochs * cost["tempflow"] / cost[like]
        return [max(1, round(quarter * total)) for quarter in QUARTERS]

    def tuning_tasks(self) -> list[Task]:
        """The grid of every method, evaluated at the end of the budget of evaluations."""
        return [
            self.task(method, rate, seed, [self.quarters(method, "evaluations")[-1]])
            for seed in self.scale.tuning_seeds
            for method in METHODS
            for rate in self.scale.learning_rates
        ]

    def tuned(self) -> dict[str, dict[float, float]]:
        """Reward at the end by method and learning rate, mean over the tuning seeds."""
        found: dict[str, dict[float, list[float]]] = {}
        for task in self.tuning_tasks():
            line = self.results.lines[task.key]
            reward = -1e9 if line["diverged"] else line["points"][-1]["reward"]
            found.setdefault(task.method, {}).setdefault(task.learning_rate, []).append(reward)
        return {m: {r: statistics.mean(v) for r, v in by.items()} for m, by in found.items()}

    def rate_of(self, method: str) -> float:
        """The best of the grid; the control takes that of the method that it controls."""
        by_rate = self.tuned()["tempflow" if method in CONTROL else method]
        return max(by_rate, key=lambda rate: by_rate[rate])

    def reported_tasks(self) -> list[Task]:
        """To the larger of the two budgets, at every quarter of both."""
        return [
            self.task(
                method,
                self.rate_of(method),
                seed,
                [epoch for budget in BUDGETS for epoch in self.quarters(method, budget)],
            )
            for seed in self.scale.seeds
            for method in METHODS | CONTROL
        ]

    def run(self, pool: Pool, tasks: list[Task]) -> None:
        """What is missing of ``tasks``; each result is kept as soon as it is there."""
        missing = [task for task in tasks if task.key not in self.results.lines]
        started = time.monotonic()
        for done, line in enumerate(pool.imap_unordered(work, missing), 1):
            self.results.add(line)
            task, last = line["task"], (line["points"] or [{}])[-1]
            print(
                f"{done}/{len(missing)} {time.monotonic() - started:.0f} s: {task['method']} "
                f"lr {task['learning_rate']:g} seed {task['seed']}: "
                f"reward {last.get('reward', math.nan):.3f} "
                f"judge {last.get('digit-judge', math.nan):.3f}",
                flush=True,
            )
