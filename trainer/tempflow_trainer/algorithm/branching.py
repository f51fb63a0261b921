"""Which steps are stochastic, how many draws each makes, and where trunk and draws go on."""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Tail:
    """How the deterministic rest of a trajectory is solved, after its last stochastic step."""

    solver: str = "euler"
    """``euler``, or ``dpm2`` of second order."""
    steps: int = 1000
    """At most so many; a tail never has more than the schedule has left."""

    def nodes(self, start: int, total_steps: int) -> tuple[int, ...]:
        """Indices of the noise levels it passes, from ``start`` to the image, evenly spread."""
        left = total_steps - start
        steps = max(1, min(self.steps, left)) if left else 0
        between = [(i * left + steps // 2) // steps for i in range(1, steps + 1)]
        return (start, *(start + far for far in between))


EXACT = Tail()
"""Every step of the schedule."""


@dataclass(frozen=True)
class BranchPlan:
    """How a trajectory is explored.

    TempFlow-GRPO: the trunk is deterministic; at each step of ``steps`` it is branched ``draws``
    times, and each draw is completed deterministically. Flow-GRPO: it is branched once, at the
    first of the steps, and each draw goes on through all of them.
    """

    total_steps: int
    steps: tuple[int, ...]
    """Stochastic steps, rising."""
    draws: int
    """K."""
    trunk_follows_draw: bool
    """Whether a draw goes on to the next stochastic step, or every step has draws of its own."""
    landings: tuple[int, ...] = ()
    """Index of the noise level to which each of the steps leads; the next one where empty."""
    tail: Tail = EXACT

    def __post_init__(self) -> None:
        """Refuse a plan that no rollout can follow.

        Raises:
            ValueError: steps that do not rise or lie outside, or jumps that lead elsewhere.
        """
        if list(self.steps) != sorted(set(self.steps)) or not self.steps:
            raise ValueError(f"branch steps must rise, got {self.steps}")
        if self.steps[0] < 0 or self.steps[-1] >= self.total_steps:
            raise ValueError(f"branch steps {self.steps} outside 0..{self.total_steps - 1}")
        if not self.landings:
            object.__setattr__(self, "landings", tuple(step + 1 for step in self.steps))
        jumps = zip(self.steps, self.landings, strict=True)
        if not all(step < landing <= self.total_steps for step, landing in jumps):
            raise ValueError(f"steps {self.steps} cannot lead to {self.landings}")
        if self.trunk_follows_draw and any(
            landing > after for landing, after in zip(self.landings, self.steps[1:], strict=False)
        ):
            raise ValueError(f"a trajectory jumps over its own steps: {self.steps} {self.landings}")

    @property
    def starts(self) -> tuple[int, ...]:
        """The steps at which draws leave the trunk."""
        return self.steps[:1] if self.trunk_follows_draw else self.steps

    @property
    def images_per_group(self) -> int:
        """Images to decode and score for one start noise."""
        return len(self.starts) * self.draws

    @property
    def states_per_step(self) -> int:
        """States of a stochastic step to train on: one that the draws share, or one for each."""
        return self.draws if self.trunk_follows_draw and len(self.steps) > 1 else 1

    @property
    def rows_per_group(self) -> int:
        """Velocities to train on for one start noise."""
        return len(self.steps) * self.states_per_step

    @property
    def trunk_evaluations(self) -> int:
        """Velocities of the trunk: it ends where the last draws leave it."""
        return self.starts[-1] + 1

    @property
    def rollout_evaluations(self) -> int:
        """Velocities to compute for one start noise: the trunk's and those of all its draws."""
        routes = sum(len(self.route(start)) - 1 for start in self.starts)
        return self.trunk_evaluations + self.draws * routes

    def route(self, start: int) -> tuple[int, ...]:
        """Indices of the noise levels that the draws of ``start`` pass, from where they land to
        the image."""
        landing_of = dict(zip(self.steps, self.landings, strict=True))
        if not self.trunk_follows_draw:
            return self.tail.nodes(landing_of[start], self.total_steps)
        between: list[int] = []
        for step, after in pairwise(self.steps):
            between.extend(range(landing_of[step], after))
            between.append(after)
        return tuple(between) + self.tail.nodes(self.landings[-1], self.total_steps)


def plan(
    *,
    method: str,
    total_steps: int,
    branch_steps: list[int],
    draws: int,
    landings: tuple[int, ...] = (),
    tail: Tail = EXACT,
) -> BranchPlan:
    """The plan of ``method``; without ``branch_steps`` all steps but the last, whose noise is
    too small to explore with and overflows the likelihood."""
    steps = tuple(sorted(branch_steps)) or tuple(range(total_steps - 1))
    follows = method == "flow-grpo"
    return BranchPlan(total_steps, steps, draws, follows, landings, tail)
