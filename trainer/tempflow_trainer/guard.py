"""Whether a run is going wrong: decided here from its own record, acted upon in ``session.py``.

The decision reads nothing but epochs and evaluations that are the same on every rank, so all ranks
decide alike, and a run that is continued decides as the uninterrupted one.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tempflow_api.record import Evaluation, Metrics
from tempflow_api.v1alpha1 import Guard as Limits

WINDOW = 20
"""Epochs that the usual gradient norm is taken from."""
PATIENCE = 3
"""Epochs without spread in a row: a single one happens when a prompt is solved."""


@dataclass(frozen=True)
class Guard:
    """What is remembered of a run, and what is not normal about its newest epoch."""

    limits: Limits
    clip_range: float
    held_out: tuple[str, ...]
    """Rewards that are not trained on."""
    first: list[Metrics] = field(default_factory=list)
    """The first epoch, once there is one."""
    recent: list[Metrics] = field(default_factory=list)
    """The last epochs, oldest first."""
    first_evaluation: list[Evaluation] = field(default_factory=list)

    def remember(self, epochs: Sequence[Metrics], evaluations: Sequence[Evaluation]) -> None:
        """Forget all, and take these as the run so far."""
        self.first[:] = epochs[:1]
        self.recent[:] = epochs[-WINDOW:]
        self.first_evaluation[:] = evaluations[:1]

    def remember_told(self, said: str) -> None:
        """``remember`` what ``tell`` has written."""
        epochs, evaluations = json.loads(said)
        self.remember(
            [Metrics.model_validate(line) for line in epochs],
            [Evaluation.model_validate(line) for line in evaluations],
        )

    def epoch(self, now: Metrics) -> list[str]:
        """The alarms about an epoch, which is then remembered."""
        alarms = [
            *_ratio(now, self.limits.ratio_drift * self.clip_range),
            *_gradient(self.recent, now, self.limits.grad_norm),
            *_spread([*self.recent, now], self.limits.zero_spread_share),
            *_reward(self.first, now, self.limits.reward_drop),
        ]
        self.first[:] = self.first or [now]
        self.recent[:] = [*self.recent, now][-WINDOW:]
        return alarms

    def evaluation(self, now: Evaluation) -> list[str]:
        """The alarms about an evaluation; the first one is what later ones are compared with."""
        if not self.first_evaluation:
            self.first_evaluation.append(now)
            return []
        limit, before = self.limits.held_out_drop, self.first_evaluation[0]
        alarms = []
        for name in self.held_out if limit else ():
            then, found = before.rewards.get(name), now.rewards.get(name)
            if then is None or found is None:
                continue  # it gave no score: nothing is known
            least = then.mean - limit * then.std
            if found.mean < least:
                alarms.append(
                    f"held-out reward {name} is {found.mean:.4g}, {then.mean:.4g} before "
                    f"training (alarm below {least:.4g})"
                )
        return alarms


def tell(epochs: Sequence[Metrics], evaluations: Sequence[Evaluation]) -> str:
    """Of a run so far what a guard remembers, as text for the other ranks."""
    parts = ([*epochs[:1], *epochs[1:][-WINDOW:]], evaluations[:1])
    return json.dumps(
        [[line.model_dump(mode="json", by_alias=True) for line in lines] for lines in parts]
    )


def _ratio(now: Metrics, limit: float) -> list[str]:
    if limit == 0 or now.ratio_drift <= limit:
        return []
    return [f"mean |ratio - 1| is {now.ratio_drift:.3g} (alarm above {limit:.3g})"]


def _gradient(recent: Sequence[Metrics], now: Metrics, factor: float) -> list[str]:
    if factor == 0 or not recent:
        return []
    usual = statistics.median(epoch.grad_norm for epoch in recent)
    if now.grad_norm <= factor * usual:
        return []
    return [
        (
            f"gradient norm is {now.grad_norm:.3g}, usually {usual:.3g} "
            f"(alarm above {factor * usual:.3g})"
        )
    ]


def _spread(epochs: Sequence[Metrics], limit: float) -> list[str]:
    last = [epoch.advantage_zero_share for epoch in epochs[-PATIENCE:]]
    if limit == 0 or len(last) < PATIENCE or min(last) < limit:
        return []
    return [
        (
            f"{last[-1]:.0%} of the groups have no spread, the third epoch in a row "
            f"(alarm from {limit:.0%})"
        )
    ]


def _reward(first: Sequence[Metrics], now: Metrics, limit: float) -> list[str]:
    if limit == 0 or not first:
        return []
    least = first[0].reward - limit * first[0].reward_std
    if now.reward >= least:
        return []
    return [f"reward is {now.reward:.4g}, {first[0].reward:.4g} at first (alarm below {least:.4g})"]
