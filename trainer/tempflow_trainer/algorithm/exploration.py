"""What a job explores in an epoch, from its specification and a schedule alone.

No model is needed: what a run will do can be told before it starts.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from tempflow_api.v1alpha1 import Algorithm, Sampling
from tempflow_trainer import seeds
from tempflow_trainer.algorithm import branching, sde, weighting
from tempflow_trainer.algorithm.branching import BranchPlan, Tail
from tempflow_trainer.algorithm.schedule import Schedule
from tempflow_trainer.algorithm.sde import Transitions


@dataclass(frozen=True)
class Exploration:
    """The stochastic steps of every epoch, their noise and their weights."""

    algorithm: Algorithm
    sampling: Sampling
    schedule: Schedule

    def plan(self, epoch: int) -> BranchPlan:
        """The same on every rank and after every restart: chance is named by the epoch."""
        steps = self._steps(epoch)
        landings = tuple(self._landing(step) for step in steps)
        if self.algorithm.method == "flow-grpo":
            steps, landings = _without_jumped_over(steps, landings)
        return branching.plan(
            method=self.algorithm.method,
            total_steps=self.schedule.steps,
            branch_steps=list(steps),
            draws=self.algorithm.branches_per_seed,
            landings=landings,
            tail=Tail(**self.sampling.tail.model_dump()),
        )

    def trajectory(self, epoch: int) -> BranchPlan:
        """One draw through all stochastic steps of the epoch, but those that it jumps over."""
        plan = self.plan(epoch)
        steps, landings = _without_jumped_over(plan.steps, plan.landings)
        return replace(plan, steps=steps, landings=landings, draws=1, trunk_follows_draw=True)

    def transitions(self, plan: BranchPlan) -> Transitions:
        """The stochastic steps of a plan."""
        sampling = self.sampling
        return sde.transitions(
            sampling.sde, self.schedule, sampling.noise_level, plan.steps, plan.landings
        )

    def weights_S(self, plan: BranchPlan) -> Tensor:
        """Of the plan's steps in the policy loss; their mean is 1."""
        return weighting.weights_S(self.algorithm.weighting, self.transitions(plan))

    def _steps(self, epoch: int) -> tuple[int, ...]:
        """``spec.algorithm.branchSet`` of the candidates."""
        among = sorted(self.algorithm.branch_steps) or list(range(self.schedule.steps - 1))
        chosen = self.algorithm.branch_set
        places = len(among) - chosen.count
        if chosen.choose == "first":
            return tuple(among[: chosen.count])
        if chosen.choose == "random":
            order = seeds.permutation(len(among), self.algorithm.seed, "branch steps", epoch)
            return tuple(among[i] for i in sorted(order[: chosen.count]))
        if chosen.choose == "sliding":
            place = min(epoch // chosen.every_epochs, places)
            return tuple(among[place : place + chosen.count])
        if chosen.choose == "window":
            place = seeds.permutation(places + 1, self.algorithm.seed, "window", epoch)[0]
            return tuple(among[place : place + chosen.count])
        return tuple(among)

    def _landing(self, step: int) -> int:
        """Where the noise of the jump reaches ``spec.algorithm.mergeBelow``, at the latest at the
        last noise level above zero: there is no likelihood at zero."""
        last = self.schedule.steps - 1
        for landing in range(step + 1, last):
            jump = sde.transitions(
                self.sampling.sde, self.schedule, self.sampling.noise_level, [step], [landing]
            )
            if float(jump.noise_std_S) >= self.algorithm.merge_below:
                return landing
        return max(last, step + 1)


def _without_jumped_over(
    steps: tuple[int, ...], landings: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What one trajectory can follow: a step that it jumped over is none of its own."""
    kept: list[tuple[int, int]] = []
    for step, landing in zip(steps, landings, strict=True):
        if not kept or step >= kept[-1][1]:
            kept.append((step, landing))
    return tuple(step for step, _ in kept), tuple(landing for _, landing in kept)
