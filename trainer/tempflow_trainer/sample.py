"""Draw images with a trained result: what ``tempflow sample`` starts."""

import argparse
import os
import sys
from pathlib import Path

import torch
from pydantic import ValidationError

from tempflow_api import checkpoint_layout as layout
from tempflow_api import naming
from tempflow_api.errors import ModelUnavailable, TempFlowError
from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer import seeds
from tempflow_trainer.evaluation import write_grid
from tempflow_trainer.ledger import look
from tempflow_trainer.main import device_of, set_memory_savers, text_encoder_of
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


def read_spec(folder: Path, device: str | None = None) -> JobSpec:
    """The specification stored with a result, for ``device`` instead of its own.

    Raises:
        ModelUnavailable: damaged, or written by a version with other fields.
    """
    file = folder / layout.CONFIG
    try:
        stored = JobSpec.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ModelUnavailable(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["spec", *map(str, first["loc"])])
        raise ModelUnavailable(f"{file} is not a job: {where}: {first['msg']}") from error
    compute = stored.compute.model_copy(update={"device": device or stored.compute.device})
    return stored.model_copy(update={"compute": compute})


def model_cache(folder: Path) -> Path:
    """Where the run of the result in ``folder`` keeps models, or where this machine does."""
    run = folder.parent.parent if folder.parent.name == layout.CHECKPOINTS else folder.parent
    return Path(os.environ.get(naming.ENV_MODEL_CACHE, run / "models"))


def draw(
    model: FlowModel, spec: JobSpec, prompts: list[str], *, count: int, seed: int
) -> torch.Tensor:
    """Images as 8-bit numbers, [prompts, count, 3, height, width]; the seed names the noise.

    The device holds no more at once than in the run: rows, decodes and text encoders are as there.
    """
    sampling, device = spec.sampling, device_of(spec, 0)
    set_memory_savers(spec, model)
    text = text_encoder_of(spec, model, device)
    policy = Policy.of(
        model,
        guidance_scale=sampling.guidance_scale,
        negative_prompt=sampling.negative_prompt,
        device=device,
        text=text,
        rows_per_decode=spec.compute.rows_per_decode,
    )
    shape = model.latent_shape(sampling.height, sampling.width)
    schedule = model.schedule(spec.evaluation.steps, sampling.height, sampling.width)
    walker = Walker(policy, schedule, sampling.noise_level, spec.compute.rows_per_call)
    images = []
    for prompt in prompts:
        conditioning = text.encode([prompt])
        for rows in torch.arange(count).split(spec.compute.rows_per_call):
            starts = [seeds.normal(shape, seed, "sample", prompt, i) for i in rows.tolist()]
            latents = walker.sample(torch.stack(starts), conditioning.rows(torch.zeros_like(rows)))
            images.append((policy.decode(latents) * 255).round().byte())
    found = torch.cat(images)
    return found.reshape(len(prompts), count, *found.shape[1:])


def arguments() -> argparse.Namespace:
    """The command line; ``tempflow sample`` documents it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grid.png"))
    parser.add_argument("--base", action="store_true", help="the model before training")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="instead of the run's own")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code; an error is one line on stderr."""
    given = arguments()
    try:
        folder = find_result(given.source)
        spec = read_spec(folder, given.device)
        model = families.load(spec.model, cache=model_cache(folder), device=device_of(spec, 0))
        if not given.base:
            load_result(model, folder)
        images = draw(model, spec, given.prompt, count=given.count, seed=given.seed)
    except TempFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(error.exit_code)
    try:
        write_grid(images, given.prompt, given.out)
    except OSError as error:
        sys.stderr.write(f"error: cannot write {given.out}: {error.strerror}\n")
        return 1
    sys.stdout.write(f"{given.out}\n")
    return 0
