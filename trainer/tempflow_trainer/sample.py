"""Draw images with a trained result: what ``tempflow sample`` starts."""

import argparse
import sys
from pathlib import Path

import torch
from pydantic import ValidationError

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ModelUnavailable, TempFlowError
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import seeds
from tempflow_trainer.evaluation import write_grid
from tempflow_trainer.ledger import look
from tempflow_trainer.main import device_of
from tempflow_trainer.models import families
from tempflow_trainer.models.base import FlowModel, Policy
from tempflow_trainer.models.tuning import load_result
from tempflow_trainer.rollout import Walker
from tempflow_trainer.store import FolderStore


def find_result(start: Path) -> Path:
    """The folder with ``config.json`` and the weights: ``start`` itself, or the newest complete
    checkpoint of the run folder ``start``.

    Raises:
        ModelUnavailable: there is neither.
    """
    if (start / layout.CONFIG).is_file():
        return start
    committed = look(FolderStore(start)).committed if start.is_dir() else []
    if not committed:
        raise ModelUnavailable(
            f"{start} holds no result: expected a checkpoint's folder with {layout.CONFIG}, or a "
            f"run's folder with {layout.CHECKPOINTS}/"
        )
    return start / layout.CHECKPOINTS / committed[0].name


def read_spec(folder: Path) -> JobSpec:
    """The specification stored with a result.

    Raises:
        ModelUnavailable: damaged, or written by a version with other fields.
    """
    try:
        return JobSpec.model_validate_json((folder / layout.CONFIG).read_bytes())
    except ValidationError as error:
        raise ModelUnavailable(f"{folder / layout.CONFIG} is not a job: {error}") from error


def draw(
    model: FlowModel, spec: JobSpec, prompts: list[str], *, count: int, seed: int
) -> torch.Tensor:
    """Images as 8-bit numbers, [prompts, count, 3, height, width]; the seed names the noise."""
    sampling = spec.sampling
    policy = Policy.of(
        model,
        guidance_scale=sampling.guidance_scale,
        negative_prompt=sampling.negative_prompt,
        device=device_of(spec, 0),
    )
    shape = model.latent_shape(sampling.height, sampling.width)
    schedule = model.schedule(spec.evaluation.steps, sampling.height, sampling.width)
    walker = Walker(policy, schedule, sampling.noise_level, spec.compute.rows_per_call)
    rows = []
    for prompt in prompts:
        starts = torch.stack([seeds.normal(shape, seed, "sample", prompt, i) for i in range(count)])
        conditioning = model.encode([prompt]).rows(torch.zeros(count, dtype=torch.long))
        images = model.decode(walker.sample(starts, conditioning)).cpu()
        rows.append((images * 255).round().byte())
    return torch.stack(rows)


def arguments() -> argparse.Namespace:
    """The command line; ``tempflow sample`` documents it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grid.png"))
    parser.add_argument("--base", action="store_true", help="the model before training")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code; an error is one line on stderr."""
    given = arguments()
    try:
        folder = find_result(given.source)
        spec = read_spec(folder)
        model = families.load(spec.model, cache=folder.parent / "models", device=device_of(spec, 0))
        if not given.base:
            load_result(model, folder)
        images = draw(model, spec, given.prompt, count=given.count, seed=given.seed)
        write_grid(images, given.prompt, given.out)
    except TempFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(error.exit_code)
    except OSError as error:
        sys.stderr.write(f"error: cannot write {given.out}: {error.strerror}\n")
        return 1
    sys.stdout.write(f"{given.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
