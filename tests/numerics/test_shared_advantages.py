"""However many ranks share the work, a draw is compared with the same draws."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from tempflow_trainer import experience, loop
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.loop import Run
from tests.numerics.toys import FLOW_GRPO, run_of, spec_of

SEED_GROUPS: dict[str, object] = {"algorithm.advantage": {"scope": "seed", "deviation": "group"}}
PROMPT_GROUPS: dict[str, object] = {
    "algorithm.advantage": {"scope": "prompt", "deviation": "global"}
}


@dataclass
class Meeting:
    """Where threads that play ranks leave what they have for each other."""

    world: int
    places: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._all = Barrier(self.world, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What all of them have, in order."""
        self.places[rank] = value
        self._all.wait()
        found = [self.places[rank] for rank in range(self.world)]
        self._all.wait()
        return found


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    meeting: Meeting

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        parts = list(tensors)
        listed = self.meeting.exchange(self.rank, [part.clone() for part in parts])
        for part, shares in zip(parts, zip(*listed, strict=True), strict=True):
            part.copy_(torch.stack(shares).sum(dim=0))

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        return self.meeting.exchange(self.rank, rows)

    def any(self, flag: bool) -> bool:
        return any(self.meeting.exchange(self.rank, flag))


Advantages = dict[tuple[int, int], Tensor]


def advantages(
    changes: dict[str, object], world: int, monkeypatch: pytest.MonkeyPatch
) -> Advantages:
    """Of every (position, seed) in an epoch, [S, K]."""
    spec = spec_of(changes)
    meeting = Meeting(world)
    runs = [
        replace(run_of(spec), ranks=ThreadRanks(rank, world, 0, meeting)) for rank in range(world)
    ]
    given: dict[int, Tensor] = {}
    plain: Callable[..., Any] = experience.of_rollouts

    def watch(rollouts: Any, advantages_GSK: Tensor, plan: Any, walker: Any, weights: Any) -> Any:
        given[id(walker)] = advantages_GSK
        return plain(rollouts, advantages_GSK, plan, walker, weights)

    monkeypatch.setattr(experience, "of_rollouts", watch)
    with ThreadPoolExecutor(world) as ranks:
        list(ranks.map(lambda run: loop.run_epoch(run, 0), runs))
    found: Advantages = {}
    for run in runs:
        for group, advantages_SK in zip(groups_of(run), given[id(run.walker)], strict=True):
            found[group] = advantages_SK
    return found


def groups_of(run: Run) -> list[tuple[int, int]]:
    shares = run.order.shares(0, rank=run.ranks.rank, world=run.ranks.world)
    return [(group.position, group.seed) for share in shares for group in share]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    "changes", [SEED_GROUPS, PROMPT_GROUPS, FLOW_GRPO], ids=["seed", "prompt", "flow-grpo"]
)
def test_ranks_find_the_advantages_of_one_process(
    changes: dict[str, object], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks cannot share eight groups evenly."""
    one = advantages(changes, 1, monkeypatch)
    several = advantages(changes, world, monkeypatch)
    assert len(one) == 8
    assert several.keys() == one.keys()
    for group, expected in one.items():
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(several[group], expected, rtol=0, atol=1e-6)
