"""An epoch's phases on a GPU, with networks of the size of published models and random weights.

    PYTHONPATH=sdk:trainer:. python -m benchmarks.gpu --model sd35m --pixels 512
    PYTHONPATH=sdk:trainer:. python -m benchmarks.gpu --model flux --pixels 1024 --checkpointing

The product's own rollout, decode and update, and, with --naive, the published order: one start
noise at a time, forward and backward repeated for each draw. Prints a table in Markdown. --model
tiny runs anywhere: it only shows that the program works.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn

from benchmarks import flops
from benchmarks.nested import Branches, RepeatedForward, roll_out
from tempflow_api.v1alpha1 import (
    Algorithm,
    Compute,
    Data,
    JobSpec,
    Lora,
    Model,
    RewardTerm,
    Sampling,
)
from tempflow_trainer import experience, loop, main, seeds
from tempflow_trainer.algorithm.advantages import AdvantageRule, advantages_GSK
from tempflow_trainer.data import load_prompts
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.loop import Run
from tempflow_trainer.models.base import Conditioning, FlowModel
from tempflow_trainer.models.families.flux import Flux
from tempflow_trainer.models.families.sd3 import Sd3

ALONE = Ranks(rank=0, world=1, local_rank=0)
FULL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
TINY_VAE = {**FULL_VAE, "block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 1}


@dataclass(frozen=True)
class Size:
    """A network to time: how to make it, and what one row of it costs."""

    family: Literal["sd3", "flux"]
    network: Callable[[], Any]
    """diffusers' own class, which is untyped."""
    vae: dict[str, object]
    text_tokens: int
    guidance: float
    cost: Callable[..., float]


def _sd3(**changes: object) -> Callable[[], Any]:
    published = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }
    return lambda: SD3Transformer2DModel(**{**published, **changes})


SIZES = {
    "sd35m": Size("sd3", _sd3(), FULL_VAE, 77 + 128, 4.5, flops.sd3),
    # The defaults of the class are those of the published model.
    "flux": Size(
        "flux",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        FULL_VAE,
        128,
        3.5,
        flops.flux,
    ),
    "tiny": Size(
        "sd3",
        _sd3(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_projection_dim=16,
            dual_attention_layers=(0,),
        ),
        TINY_VAE,
        16,
        4.5,
        flops.sd3,
    ),
}


class RandomText:
    """Random conditioning of the right shapes: the text side is frozen and not timed."""

    def __init__(self, size: Size, network: Any, device: torch.device) -> None:
        config = network.config
        self._shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (size.text_tokens, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }
        self._device = device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(
            {
                name: torch.stack([seeds.normal(shape, 0, name, p) for p in prompts]).to(
                    self._device
                )
                for name, shape in self._shapes.items()
            }
        )


def model_of(size: Size, device: torch.device, dtype: torch.dtype) -> FlowModel:
    """The family's own adapter around random networks, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with device:
            network, vae = size.network(), AutoencoderKL(**size.vae)
    finally:
        torch.set_default_dtype(before)
    pipeline = SimpleNamespace(
        transformer=network,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=size.family == "flux"
        ),
        vae_scale_factor=8,
        components={},
        **{name: nn.Identity() for name in ("text_encoder", "text_encoder_2", "text_encoder_3")},
    )
    family = Flux if size.family == "flux" else Sd3
    model: FlowModel = family(pipeline, max_text_tokens=size.text_tokens)
    model.encode = RandomText(size, network, device).encode  # type: ignore[method-assign]
    return model


def spec_of(given: argparse.Namespace, size: Size) -> JobSpec:
    """The paper's settings for one epoch of ``given.prompts`` prompts."""
    return JobSpec(
        model=Model(
            family=size.family,
            source="unused",
            precision=given.precision,
            tuning="lora",
            lora=Lora(),
        ),
        data=Data(prompts=[f"prompt {i}" for i in range(given.prompts)]),
        sampling=Sampling(
            steps=given.steps,
            width=given.pixels,
            height=given.pixels,
            guidance_scale=size.guidance,
        ),
        algorithm=Algorithm(
            prompts_per_epoch=given.prompts,
            seeds_per_prompt=given.seeds,
            branches_per_seed=given.draws,
            updates_per_epoch=1,
        ),
        rewards=[RewardTerm(name="digit-ink")],
        compute=Compute(
            device=given.device,
            rows_per_call=given.rows,
            rows_per_training_call=given.training_rows,
            rows_per_decode=given.decode_rows,
            gradient_checkpointing=given.checkpointing,
        ),
    )


@dataclass
class Phase:
    """One phase's measurement."""

    seconds: float
    peak_bytes: int | None
    rows: float
    """Forwards of the network, a backward counted as two."""


class Meter:
    """Seconds, peak memory and rows of the network, by phase."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.phases: dict[str, Phase] = {}
        self._run, self._cuda = run, device.type == "cuda"

    def __call__(self, name: str, work: Callable[[], object]) -> object:
        before = dict(self._run.policy.evaluations)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        found = work()
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        made = {k: v - before[k] for k, v in self._run.policy.evaluations.items()}
        peak = torch.cuda.max_memory_allocated() if self._cuda else None
        # Frozen weights: the backward computes gradients of activations only, one more forward's
        # work, and with checkpointing the forward once more.
        backward = 2 if self._run.policy.model.transformer.is_gradient_checkpointing else 1
        rows = sum(made.values()) + backward * made["training"]
        self.phases[name] = Phase(seconds, peak, rows)
        return found


@dataclass(frozen=True)
class Epoch:
    """What both ways get: the same noise, prompts and advantages."""

    run: Run
    starts_GCHW: Tensor
    conditioning: Conditioning
    noise_SGKCHW: Tensor
    advantages_GSK: Tensor


def epoch_of(run: Run, given: argparse.Namespace) -> Epoch:
    """An epoch as it is in the middle of training, with random rewards."""
    prompts = [f"prompt {i}" for i in range(given.prompts) for _ in range(given.seeds)]
    groups, steps = len(prompts), len(run.exploration.plan(0).steps)
    rewards = seeds.normal((groups, steps, given.draws), 0, "rewards")
    ids = torch.arange(groups) // given.seeds
    noise = seeds.normal((steps, groups, given.draws, *run.latent_shape), 0, "noise")
    return Epoch(
        run,
        seeds.normal((groups, *run.latent_shape), 0, "start"),
        run.policy.text.encode(prompts),
        noise,
        advantages_GSK(rewards, ids, AdvantageRule("seed", "group", 1e-4, 5.0)),
    )


def decode(run: Run, latents_NCHW: Tensor) -> None:
    for part in latents_NCHW.split(run.walker.rows_per_call):
        run.policy.decode(part)


def measure_ours(epoch: Epoch, meter: Meter) -> None:
    """The rollout is timed apart from what follows."""
    run = epoch.run
    rolled = meter(
        "rollout",
        lambda: run.walker.collect(
            run.exploration.plan(0),
            epoch.starts_GCHW,
            epoch.conditioning,
            lambda k: epoch.noise_SGKCHW[k],
        ),
    )
    meter("decode", lambda: decode(run, rolled.latents_NCHW))  # type: ignore[attr-defined]
    learned = experience.of_rollouts(
        rolled,  # type: ignore[arg-type]
        epoch.advantages_GSK,
        run.exploration.plan(0),
        run.walker,
        run.exploration.weights_S(run.exploration.plan(0)),
    )
    meter("update", lambda: loop.update(run, learned, epoch.conditioning))


def measure_naive(epoch: Epoch, meter: Meter) -> None:
    """One start noise at a time, and a forward and backward for each draw."""
    run, draws = epoch.run, epoch.noise_SGKCHW.shape[2]
    repeated = RepeatedForward(
        run.walker,
        run.tuning,
        run.exploration.weights_S(run.exploration.plan(0)),
        run.objective.clip_range,
        run.objective.kl_coefficient,
    )

    def walk() -> Branches:
        parts = torch.arange(len(epoch.starts_GCHW)).split(1)
        return Branches.join(
            [
                roll_out(
                    run.walker,
                    epoch.starts_GCHW[part],
                    epoch.conditioning.rows(part),
                    epoch.noise_SGKCHW[:, part],
                )
                for part in parts
            ]
        )

    def train(rolled: Branches) -> None:
        run.optimizer.zero_grad(set_to_none=False)
        repeated.backward(rolled, epoch.advantages_GSK, epoch.conditioning, draws)
        nn.utils.clip_grad_norm_(run.tuning.parameters().values(), run.max_grad_norm)
        run.optimizer.step()

    rolled = meter("rollout", walk)
    assert isinstance(rolled, Branches)
    meter("decode", lambda: decode(run, rolled.latents_GSKCHW.flatten(0, 2)))
    meter("update", lambda: train(rolled))


def table(name: str, meter: Meter, *, images: int, row_flops: float, peak: float | None) -> str:
    """In Markdown: a line a phase."""
    lines = [
        f"\n{name}\n\n| phase | s | share | rows | TFLOP | MFU | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = sum(phase.seconds for phase in meter.phases.values())
    for title, phase in meter.phases.items():
        done = phase.rows * row_flops / 1e12
        used = f"{done / phase.seconds / peak:.1%}" if peak and done else "-"
        memory = f"{phase.peak_bytes / 2**30:.1f} GiB" if phase.peak_bytes else "-"
        lines.append(
            f"| {title} | {phase.seconds:.3f} | {phase.seconds / whole:.0%} | {phase.rows:,.0f} | "
            f"{done:,.2f} | {used} | {memory} |"
        )
    rows = sum(phase.rows for phase in meter.phases.values())
    used = f"{rows * row_flops / 1e12 / whole / peak:.1%}" if peak else "-"
    lines.append(f"\n{images / whole:.2f} images/s, {whole:.2f} s an epoch, MFU {used}")
    return "\n".join(lines)


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--model", choices=SIZES, required=True)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=["bfloat16", "float16", "float32"], default=None)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--training-rows", type=int, default=4)
    parser.add_argument("--decode-rows", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--naive", action="store_true", help="time the published order, too")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not known")
    given = parser.parse_args(line)
    given.precision = given.precision or ("bfloat16" if given.device == "cuda" else "float32")
    return given


def run(line: Sequence[str] | None = None) -> dict[str, Meter]:
    """Measure and print; the meters by way."""
    given = arguments(line)
    size = SIZES[given.model]
    spec = spec_of(given, size)
    device = main.device_of(spec, 0)
    model = model_of(size, device, getattr(torch, given.precision))
    made = main.build_run(spec, model, load_prompts(spec), ALONE, device, lambda: False)
    epoch = epoch_of(made, given)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    peak = given.peak_tflops or flops.peak_of(name)
    row_flops = size.cost(model.transformer.config, given.pixels, size.text_tokens)
    print(
        f"{given.model}, {given.pixels} px, {given.precision}, {name}, torch {torch.__version__}: "
        f"{row_flops / 1e12:.3f} TFLOP a row"
    )
    found = {}
    for way, measure in {"ours": measure_ours, "naive": measure_naive}.items():
        if way == "naive" and not given.naive:
            continue
        measure(epoch, Meter(made, device))  # once to warm up
        found[way] = Meter(made, device)
        measure(epoch, found[way])
        images = len(epoch.starts_GCHW) * made.exploration.plan(0).images_per_group
        print(table(way, found[way], images=images, row_flops=row_flops, peak=peak))
    return found


if __name__ == "__main__":
    run()
