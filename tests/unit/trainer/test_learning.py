"""The example learns, by a judge that is never rewarded; with rewards shuffled it does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import loop, seeds
from tempflow_trainer.data import load_prompts
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.main import build_run, evaluator_of
from tempflow_trainer.models import families
from tempflow_trainer.rollout import Rollouts, Walker

EXAMPLE = Path(__file__).parents[3] / "examples/digits.yaml"
CPU = torch.device("cpu")
EPOCHS = 40


class Shuffled(Walker):
    """Deals the rewards of a group and step to its draws at random; some keep their own."""

    def collect(self, *args: object, **kwargs: object) -> Rollouts:
        rollouts = super().collect(*args, **kwargs)  # type: ignore[arg-type]
        image_GSK = rollouts.image_of_GSK
        groups, steps, draws = image_GSK.shape
        orders = [seeds.permutation(draws, 0, "shuffle", i) for i in range(groups * steps)]
        order_GSK = torch.tensor(orders).view(groups, steps, draws)
        return replace(rollouts, image_of_GSK=image_GSK.gather(2, order_GSK))


def judged(tmp_path: Path, walker: type[Walker]) -> tuple[float, float]:
    """Share of digits that the judge finds, before and after a part of the example's run."""
    torch.set_num_threads(1)
    spec = JobSpec.model_validate(yaml.safe_load(text_of_example())["spec"])
    model = families.load(spec.model, cache=tmp_path, device=CPU)
    prompts = load_prompts(spec)
    run = build_run(spec, model, prompts, Ranks(0, 1, 0), CPU, lambda: False)
    run.walker = walker(**vars(run.walker))
    evaluator = replace(evaluator_of(spec, run, prompts), images_per_prompt=32)

    def share() -> float:
        return float(evaluator.run().scores["digit-judge"].mean())

    before = share()
    for epoch in range(EPOCHS):
        loop.run_epoch(run, epoch)
    return before, share()


def text_of_example() -> str:
    # PyYAML reads 3e-3 as text; the command line has a reader of its own.
    return EXAMPLE.read_text().replace("3e-3", "0.003").replace("1e-2", "0.01")


@pytest.mark.slow
def test_the_example_learns(tmp_path: Path) -> None:
    before, after = judged(tmp_path, Walker)
    assert 0.45 < before < 0.75
    assert after > before + 0.08


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(tmp_path: Path) -> None:
    before, after = judged(tmp_path, Shuffled)
    assert after < before + 0.03
