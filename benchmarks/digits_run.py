"""The setting that the benchmarks share: the shipped digits model, in this process, one thread.

Written out here, and not read from a preset, so that a preset can be edited without changing what
published figures mean.
"""

import hashlib
from importlib.resources import files
from pathlib import Path

import torch

from tempflow_api.v1alpha1 import (
    Algorithm,
    Compute,
    Data,
    Ema,
    Evaluation,
    JobSpec,
    Lora,
    Model,
    Optimizer,
    RewardTerm,
    Sampling,
)
from tempflow_trainer import main
from tempflow_trainer.data import Prompt, load_prompts
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.loop import Run
from tempflow_trainer.models import families

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The averaged weights would lag behind by another number of updates for every method.
NO_AVERAGE = Ema(decay=0.0, every_updates=1)
# Chosen by `python -m benchmarks.rollout --sweep`.
ROWS_PER_CALL = 256
ROWS_PER_TRAINING_CALL = 128


def spec_of(algorithm: Algorithm, learning_rate: float) -> JobSpec:
    """A run of the digits model: the paper's T, K and noise level, a LoRA of rank 8."""
    return JobSpec(
        model=Model(
            family="digits",
            source="builtin:digits",
            tuning="lora",
            lora=Lora(rank=8, alpha=16),
            ema=NO_AVERAGE,
        ),
        data=Data(prompts=[f"{'an' if d == 'eight' else 'a'} {d}" for d in DIGITS]),
        sampling=Sampling(steps=10, width=14, height=14, guidance_scale=1.0, noise_level=0.7),
        algorithm=algorithm,
        rewards=[
            RewardTerm(name="digit-log-probability", weight=1.0),
            RewardTerm(name="digit-ink", weight=4.0, parameters={"target": "0.45"}),
            RewardTerm(name="digit-judge", weight=0.0),
        ],
        optimizer=Optimizer(learning_rate=learning_rate),
        evaluation=Evaluation(steps=10, prompts=10, images_per_prompt=16),
        compute=Compute(
            device="cpu",
            rows_per_call=ROWS_PER_CALL,
            rows_per_training_call=ROWS_PER_TRAINING_CALL,
        ),
    )


def start(spec: JobSpec) -> tuple[Run, list[Prompt]]:
    """The run as the trainer builds it, on one thread of this process, and its prompts."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model = families.load(spec.model, cache=Path("runs/models"), device=device)
    prompts = load_prompts(spec)
    alone = Ranks(rank=0, world=1, local_rank=0)
    return main.build_run(spec, model, prompts, alone, device, lambda: False), prompts


def model_digest() -> str:
    """Names the shipped model and its scorers: results with other ones do not compare."""
    root = files("tempflow_trainer") / "assets" / "digits"
    parts = (
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "classifier.safetensors",
        "judge.safetensors",
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(root.joinpath(*part.split("/")).read_bytes())
    return digest.hexdigest()[:12]
