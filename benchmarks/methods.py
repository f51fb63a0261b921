"""The methods that `benchmarks/learning.py` compares, each as the trainer runs it.

Five of them are settings of the product. Two need what it does not offer, and get it here, around
the product's parts: trajectories of Flow-GRPO that share a start noise, and shuffled rewards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor

from tempflow_api.v1alpha1 import Advantage, Algorithm
from tempflow_trainer import seeds
from tempflow_trainer.algorithm.branching import BranchPlan
from tempflow_trainer.data import Group, PromptOrder
from tempflow_trainer.loop import Run
from tempflow_trainer.models.base import Conditioning
from tempflow_trainer.rollout import Noise, Rollouts, Walker


@dataclass(frozen=True)
class Epoch:
    """Draws of an epoch: Flow-GRPO makes ``seeds`` x ``draws`` trajectories of a prompt."""

    prompts: int
    seeds: int
    draws: int


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    label: str
    branching: bool
    weighting: bool
    seed_groups: bool
    """Rewards are compared within a start noise, not within a prompt. Without branching the
    trajectories of a group then have their start noise in common."""
    shuffled: bool = False
    """The control: the rewards of a group are dealt to its draws at random; some keep their own."""

    def algorithm(self, epoch: Epoch, seed: int) -> Algorithm:
        """The settings of the product; one update an epoch, so the clip range is never reached."""
        return Algorithm(
            method="tempflow" if self.branching else "flow-grpo",
            prompts_per_epoch=epoch.prompts,
            seeds_per_prompt=epoch.seeds if self.branching else epoch.seeds * epoch.draws,
            branches_per_seed=epoch.draws if self.branching else 1,
            updates_per_epoch=1,
            weighting="noise-aware" if self.weighting else "none",
            advantage=Advantage(
                scope="seed" if self.branching and self.seed_groups else "prompt", epsilon=1e-2
            ),
            clip_range=3e-3,
            kl_coefficient=0.0,
            seed=seed,
        )

    def adapt(self, run: Run, epoch: Epoch) -> None:
        """Replace the parts of a run that no setting describes."""
        if self.seed_groups and not self.branching:
            run.walker = SharedStarts(**vars(run.walker), sharing=epoch.draws)
            run.order = SeedGroups(**vars(run.order), sharing=epoch.draws)
        if self.shuffled:
            run.walker = Shuffled(**vars(run.walker), run_seed=run.run_seed, epochs=count())


METHODS = {
    "tempflow": Method("TempFlow-GRPO", True, True, True),
    "no-branching": Method("- without branching", False, True, True),
    "no-weighting": Method("- without weighting", True, False, True),
    "no-seed-groups": Method("- without seed groups", True, True, False),
    "flow-weights": Method("Flow-GRPO with weights", False, True, False),
    "flow": Method("Flow-GRPO", False, False, False),
}
CONTROL = {"shuffled": Method("control: rewards shuffled", True, True, True, shuffled=True)}


@dataclass(frozen=True)
class SharedStarts(Walker):
    """Consecutive trajectories start from the noise of the first of them."""

    sharing: int = field(kw_only=True)

    def collect(
        self, plan: BranchPlan, starts_GCHW: Tensor, conditioning: Conditioning, noise: Noise
    ) -> Rollouts:
        """As the product does, from ``starts_GCHW`` of which only every ``sharing``-th counts."""
        first_G = torch.arange(len(starts_GCHW)) // self.sharing * self.sharing
        return super().collect(plan, starts_GCHW[first_G], conditioning, noise)


@dataclass(frozen=True)
class SeedGroups(PromptOrder):
    """Advantages are keyed by the prompt's id: here it also says which start noise is shared."""

    sharing: int

    def shares(self, epoch: int, *, rank: int, world: int) -> list[list[Group]]:
        """As the product deals them, with an id for each start noise of a prompt."""
        return [
            [self._with_start(group) for group in share]
            for share in super().shares(epoch, rank=rank, world=world)
        ]

    def _with_start(self, group: Group) -> Group:
        starts = self.seeds_per_prompt // self.sharing
        identifier = group.prompt.id * starts + group.seed // self.sharing
        return replace(group, prompt=replace(group.prompt, id=identifier))


@dataclass(frozen=True)
class Shuffled(Walker):
    """Credits the draws of a (group, step) with each other's images.

    Rewards keep their mean and their spread in every group; what they say of the draws is gone.
    """

    run_seed: int = field(kw_only=True)
    epochs: Iterator[int] = field(kw_only=True)

    def collect(
        self, plan: BranchPlan, starts_GCHW: Tensor, conditioning: Conditioning, noise: Noise
    ) -> Rollouts:
        """As the product does, but for the draw that an image belongs to."""
        rollouts = super().collect(plan, starts_GCHW, conditioning, noise)
        epoch, shape = next(self.epochs), rollouts.image_of_GSK.shape
        order_GSK = torch.tensor(
            [
                [
                    seeds.permutation(shape[2], self.run_seed, "shuffle", epoch, group, step)
                    for step in range(shape[1])
                ]
                for group in range(shape[0])
            ]
        )
        shuffled_GSK = rollouts.image_of_GSK.gather(2, order_GSK)
        return replace(rollouts, image_of_GSK=shuffled_GSK)
