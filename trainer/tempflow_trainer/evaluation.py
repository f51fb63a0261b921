"""Images from fixed noise, before, during and after training: what the run is judged by."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tempflow_api.errors import Preempted, RewardFailed
from tempflow_api.record import Evaluation as EvaluationLine
from tempflow_api.record import Spread
from tempflow_trainer import seeds
from tempflow_trainer.algorithm.combination import total_GSK
from tempflow_trainer.data import Prompt
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.metrics import now
from tempflow_trainer.rewards.base import Reward
from tempflow_trainer.rollout import Walker
from tempflow_trainer.scoring import Scoring

LEAST_CELL_PIXELS = 56
LABEL_PIXELS = 120
NO_IMAGES = torch.empty(0, 3, 1, 1)


@dataclass(frozen=True)
class Evaluation:
    """The result, the same on every rank."""

    scores: dict[str, Tensor]
    """By reward, held-out ones too, [N]; NaN where one is missing."""
    total: Tensor
    """The trained reward, [N]; NaN where a required score is missing."""
    diversity: float | None
    images_PM3HW: Tensor
    """Prompts x images a prompt, as 8-bit numbers."""


@dataclass(frozen=True)
class Evaluator:
    """Start noise depends on prompt and image number alone, so pictures compare over time."""

    walker: Walker
    reward: Reward
    prompts: Sequence[Prompt]
    images_per_prompt: int
    latent_shape: tuple[int, int, int]
    run_seed: int
    ranks: Ranks
    equal_shares: bool = False
    """Whether all ranks have to draw as many images: those that are too many are left out."""

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> Evaluation:
        """Draw and score with the weights as they are; the ranks share the work.

        Raises:
            Preempted: on every rank, when one was asked to stop before all was scored.
            RewardFailed: a required reward failed, or no image has all its required scores.
        """
        jobs = [(p, m) for p in self.prompts for m in range(self.images_per_prompt)]
        index_N = self._share(len(jobs), self.ranks.rank)
        mine = [jobs[i] for i in index_N.tolist()]
        filling = [jobs[0]] * self._filling(len(jobs))
        images = self._draw(mine + filling, self._calls(len(jobs)), stop_requested)[: len(mine)]
        texts, metadata = [p.text for p, _ in mine], [p.metadata for p, _ in mine]
        prompts = (index_N // self.images_per_prompt).tolist()
        scoring = Scoring([term.name for term in self.reward.terms], self.ranks, stop_requested)
        if mine:
            scoring.submit(
                len(mine),
                lambda on_call: self.reward.score(
                    images, texts, metadata, groups=prompts, held_out=True, on_call=on_call
                ),
            )
        scores = scoring.wait()
        order = torch.cat(self.ranks.gather_rows(index_N)).argsort()
        names = [term.name for term in self.reward.terms]
        gathered = {
            name: torch.cat(self.ranks.gather_rows(scores.get(name, torch.empty(0))))[order]
            for name in names
        }
        pictures = [
            part for part in self.ranks.gather_rows((images * 255).round().byte()) if len(part)
        ]
        shape = (len(self.prompts), self.images_per_prompt)
        images_PM3HW = torch.cat(pictures)[order].unflatten(0, shape)
        by_prompt = {name: values.view(shape[0], 1, shape[1]) for name, values in gathered.items()}
        total = total_GSK(self.reward.components(by_prompt), torch.arange(shape[0])).flatten()
        if not bool(total.isfinite().any()):
            raise RewardFailed("no image of this evaluation has all its required scores")
        return Evaluation(gathered, total, diversity(images_PM3HW), images_PM3HW)

    def _share(self, jobs: int, rank: int) -> Tensor:
        """A rank's images; all of a prompt where a reward compares them."""
        index_N = torch.arange(jobs)
        dealt_N = index_N // self.images_per_prompt if self.reward.group_wise else index_N
        return index_N[dealt_N % self.ranks.world == rank]

    def _filling(self, jobs: int) -> int:
        """Images that this rank draws for nothing, where all have to draw as many."""
        if not self.equal_shares:
            return 0
        shares = [len(self._share(jobs, rank)) for rank in range(self.ranks.world)]
        return max(shares) - shares[self.ranks.rank]

    def _calls(self, jobs: int) -> int:
        """Of the network, on the rank that has most to draw."""
        most = max(len(self._share(jobs, rank)) for rank in range(self.ranks.world))
        return math.ceil(most / self.walker.rows_per_call)

    @torch.no_grad()
    def _draw(
        self, jobs: Sequence[tuple[Prompt, int]], calls: int, stop_requested: Callable[[], bool]
    ) -> Tensor:
        """Images [N, 3, H, W]; before each of the ``calls``, also where this rank has none left,
        the ranks ask one another whether to stop."""
        policy, at_a_time = self.walker.policy, self.walker.rows_per_call
        images: list[Tensor] = []
        for call in range(calls):
            if self.ranks.any(stop_requested()):
                raise Preempted("asked to stop")
            some = jobs[call * at_a_time : (call + 1) * at_a_time]
            if not some:
                continue
            starts = [
                seeds.normal(self.latent_shape, self.run_seed, "evaluation", p.id, image)
                for p, image in some
            ]
            conditioning = policy.text.encode([p.text for p, _ in some])
            latents = self.walker.sample(torch.stack(starts), conditioning)
            images.append(policy.decode(latents))
        return torch.cat(images) if images else NO_IMAGES


def diversity(images_PM3HW: Tensor) -> float | None:
    """Root-mean-square pixel distance of two images of the same prompt, averaged over pairs and
    prompts, in units of the full range. It falls when a model draws the same image again and
    again, whatever the reward says. None with one image a prompt."""
    prompts, count = images_PM3HW.shape[:2]
    if count < 2:
        return None
    flat = images_PM3HW.float().div(255).reshape(prompts, count, -1)
    # Not by a matrix product, which for many images finds equal ones to be apart.
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    distances /= math.sqrt(flat.shape[-1])
    return float(distances.sum(dim=(1, 2)).mean() / (count * (count - 1)))


def write_grid(images_PM3HW: Tensor, labels: Sequence[str], file: Path) -> None:
    """One row a prompt, its text at the left; small images are enlarged without smoothing."""
    prompts, count, _, height, width = images_PM3HW.shape
    scale = max(1, math.ceil(LEAST_CELL_PIXELS / max(height, width)))
    cell_h, cell_w = height * scale + 2, width * scale + 2
    grid = Image.new("RGB", (LABEL_PIXELS + count * cell_w, prompts * cell_h), "white")
    pen = ImageDraw.Draw(grid)
    for row, label in enumerate(labels):
        pen.text((4, row * cell_h + cell_h // 2 - 6), label[:18], fill="black")
        for column in range(count):
            pixels = images_PM3HW[row, column].permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            grid.paste(picture, (LABEL_PIXELS + column * cell_w, row * cell_h))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    grid.save(partial, format="PNG", optimize=True)
    partial.replace(file)


def line_of(epoch: int, found: Evaluation, grid: str | None) -> EvaluationLine:
    """An evaluation as it is recorded."""
    spreads = {
        name: Spread(**_moments(values))
        for name, values in found.scores.items()
        if bool(values.isfinite().any())
    }
    total = _moments(found.total)
    return EvaluationLine(
        epoch=epoch,
        time=now(),
        reward=total["mean"],
        reward_std=total["std"],
        rewards=spreads,
        missing_scores={name: int(v.isnan().sum()) for name, v in found.scores.items()},
        diversity=found.diversity,
        images=len(found.total),
        grid=grid,
    )


def means_of(line: EvaluationLine) -> dict[str, float]:
    """Means by name, as a checkpoint's manifest has them."""
    found = {"reward": line.reward, **{name: s.mean for name, s in line.rewards.items()}}
    return {name: mean for name, mean in found.items() if math.isfinite(mean)}


def _moments(values: Tensor) -> dict[str, float]:
    """Of the scores that are there."""
    there = values[values.isfinite()]
    return {"mean": float(there.mean()), "std": float(there.std(correction=0))}
