"""Which steps are stochastic, how many draws each makes, and where the trunk goes on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BranchPlan:
    """How a trajectory is explored.

    TempFlow-GRPO: the trunk is deterministic; at each step of ``steps`` it is branched ``draws``
    times, and each draw is completed deterministically. Flow-GRPO is the limiting case without
    tails: one draw a step, from which the trunk itself goes on.
    """

    total_steps: int
    steps: tuple[int, ...]
    """Stochastic steps, rising."""
    draws: int
    """K."""
    trunk_follows_draw: bool
    """Whether the state after a stochastic step is its draw, or the deterministic step."""

    def __post_init__(self) -> None:
        """Refuse a plan that no rollout can follow.

        Raises:
            ValueError: steps that do not rise or lie outside, or several draws to follow.
        """
        if list(self.steps) != sorted(set(self.steps)) or not self.steps:
            raise ValueError(f"branch steps must rise, got {self.steps}")
        if self.steps[0] < 0 or self.steps[-1] >= self.total_steps:
            raise ValueError(f"branch steps {self.steps} outside 0..{self.total_steps - 1}")
        if self.trunk_follows_draw and self.draws != 1:
            raise ValueError("a trunk can follow one draw only")

    @property
    def images_per_group(self) -> int:
        """Images to decode and score for one start noise."""
        return 1 if self.trunk_follows_draw else len(self.steps) * self.draws

    @property
    def rollout_evaluations(self) -> int:
        """Velocities to compute for one start noise: the trunk's and the tails'."""
        if self.trunk_follows_draw:
            return self.total_steps
        tails = sum(self.total_steps - 1 - step for step in self.steps)
        return self.steps[-1] + 1 + self.draws * tails


def plan(*, method: str, total_steps: int, branch_steps: list[int], draws: int) -> BranchPlan:
    """The plan of ``method``; without ``branch_steps`` all steps but the last, whose noise is
    too small to explore with and overflows the likelihood."""
    steps = tuple(sorted(branch_steps)) or tuple(range(total_steps - 1))
    return BranchPlan(total_steps, steps, draws, trunk_follows_draw=method == "flow-grpo")
