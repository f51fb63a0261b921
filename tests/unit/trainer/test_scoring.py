"""Scoring beside the rollout: the same bits, no hidden failure, and nobody waits unseen."""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempflow_api.errors import Preempted, RewardFailed
from tempflow_trainer import loop, main, scoring
from tempflow_trainer.loop import Run
from tempflow_trainer.metrics import Stopwatch
from tempflow_trainer.models.base import Policy
from tempflow_trainer.rewards.base import Reward, Term
from tempflow_trainer.rollout import Rollouts, Walker
from tempflow_trainer.scoring import Scoring
from tests.numerics.toys import ALONE, Brightness, run_of, spec_of
from tests.unit.trainer.reward_servers import Metadata


@dataclass(frozen=True)
class Slow(Brightness):
    seconds: float = 0.01

    def score(self, images_N3HW: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        time.sleep(self.seconds)
        return super().score(images_N3HW, prompts, metadata)


class InOrder(Scoring):
    """Scores at once what is handed in, before anything else is drawn."""

    def submit(self, images: int, work: Callable[[scoring.OnCall], scoring.Scores]) -> None:
        super().submit(images, work)
        self._results[-1].result()


def epoch_of(changes: dict[str, object], scorer: Brightness) -> tuple[Run, dict[str, object]]:
    run = run_of(spec_of(changes))
    run = replace(run, reward=Reward([Term("slow", 1.0, scorer)]))
    return run, loop.run_epoch(run, 0)


def weights(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in run.tuning.parameters().values()])


@pytest.mark.parametrize("groups", [1, 3, 8, 100])
def test_results_are_those_of_scoring_in_order_bit_for_bit(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, object] = {"compute.groupsPerRollout": groups, "compute.rowsPerCall": 16}
    beside, metrics = epoch_of(changes, Slow())
    monkeypatch.setattr(loop, "Scoring", InOrder)
    in_order, expected = epoch_of(changes, Slow())
    assert torch.equal(weights(beside), weights(in_order))
    assert metrics == expected


@pytest.mark.parametrize("changes", [{}, {"algorithm.updatesPerEpoch": 2}])
def test_drawing_in_parts_draws_the_same_pictures(changes: dict[str, object]) -> None:
    whole, expected = epoch_of(changes, Brightness())
    parts, metrics = epoch_of({**changes, "compute.groupsPerRollout": 3}, Brightness())
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-6)
    assert metrics["reward"] == pytest.approx(expected["reward"], abs=1e-6)
    assert parts.policy.evaluations == whole.policy.evaluations


def test_pictures_of_one_call_are_alive_at_a_time() -> None:
    changes: dict[str, object] = {"compute.groupsPerRollout": 2, "compute.rowsPerCall": 5}
    run = run_of(spec_of(changes))
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []

    class Watched(Policy):
        def decode(self, latents_NCHW: Tensor) -> Tensor:
            images = super().decode(latents_NCHW)
            alive.append(weakref.ref(images))
            most.append(sum(one() is not None for one in alive))
            return images

    policy = Watched(
        **{field.name: getattr(run.policy, field.name) for field in fields(run.policy)}
    )
    reward = Reward([Term("slow", 1.0, Slow())])
    loop.run_epoch(replace(run, policy=policy, reward=reward), 0)
    assert len(most) > 8
    assert set(most) == {1}


class Late(Walker):
    """Takes its time to draw."""

    def collect(self, *arguments: Any) -> Rollouts:
        time.sleep(0.3)
        return super().collect(*arguments)


def test_what_is_scored_beside_the_rollout_is_hidden_time() -> None:
    slow = Slow(seconds=0.1)
    whole, _ = epoch_of({}, slow)
    assert whole.clock.hidden["scoring"] < 0.05
    assert whole.clock.seconds["scoring"] > 0.1
    run = run_of(spec_of({"compute.groupsPerRollout": 4}))
    late = Late(**vars(run.walker))
    parts = replace(run, walker=late, reward=Reward([Term("slow", 1.0, slow)]))
    loop.run_epoch(parts, 0)
    assert parts.clock.hidden["scoring"] >= 0.1, "one of two parts"
    assert parts.clock.seconds["scoring"] < 0.3


class Failing(Brightness):
    def score(self, *_arguments: object) -> Tensor:
        raise RuntimeError("the server is away")


def test_a_failure_in_the_thread_ends_the_epoch_before_anything_changes() -> None:
    run = run_of(spec_of({"compute.groupsPerRollout": 1}))
    before = weights(run)
    with pytest.raises(RewardFailed, match=r"^reward x: the server is away"):
        loop.run_epoch(replace(run, reward=Reward([Term("x", 1.0, Failing())])), 0)
    assert torch.equal(weights(run), before)


@contextmanager
def hanging() -> Iterator[Callable[[scoring.OnCall], scoring.Scores]]:
    """Work that has scored two images and then hangs until the context ends."""
    released = threading.Event()

    def work(on_call: scoring.OnCall) -> scoring.Scores:
        on_call("slow", 0)
        on_call("slow", 2)
        released.wait(10)
        return {"slow": torch.zeros(6)}

    try:
        yield work
    finally:
        released.set()


def test_a_reward_that_hangs_is_named_and_does_not_keep_a_run_from_stopping(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scoring, "BEAT_SECONDS", 0.05)
    stop = threading.Event()
    with hanging() as work, caplog.at_level(logging.INFO):
        waited = Scoring(["fast", "slow"], ALONE, stop.is_set)
        waited.submit(6, work)
        threading.Timer(0.3, stop.set).start()
        start = time.monotonic()
        with pytest.raises(Preempted):
            waited.wait()
        assert time.monotonic() - start < 5
    assert "waiting for reward slow on rank 0: 2/6 images" in caplog.text


def test_work_without_images_has_no_scores() -> None:
    assert Scoring(["a"], ALONE).wait() == {}
    clock = Stopwatch()
    alone = Scoring(["a"], ALONE, clock=clock)
    alone.submit(2, lambda _on_call: {"a": torch.ones(2)})
    alone.submit(1, lambda _on_call: {"a": torch.zeros(1)})
    assert alone.wait()["a"].tolist() == [1, 1, 0]


HERE: dict[str, object] = {"name": "digit-ink"}
SERVED: dict[str, object] = {"name": "digit-ink", "service": {"endpoints": ["http://x"]}}
CHAT: dict[str, object] = {"name": "mark", "uses": "unified-reward"}


@pytest.mark.parametrize(
    ("asked", "term", "world", "groups"),
    [
        (None, HERE, 1, None),
        (None, SERVED, 1, 3),
        (None, CHAT, 1, 3),
        (None, SERVED, 4, 1),
        (5, SERVED, 1, 5),
        (5, HERE, 1, 5),
    ],
)
def test_groups_are_drawn_in_parts_where_a_reward_is_served(
    asked: int | None, term: dict[str, object], world: int, groups: int | None
) -> None:
    changes: dict[str, object] = {
        "algorithm.promptsPerEpoch": 12,
        "rewards": [term],
        "compute.groupsPerRollout": asked,
    }
    assert main.groups_per_rollout(spec_of(changes), world) == groups
