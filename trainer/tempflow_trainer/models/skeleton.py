"""A model of a job without its weights: every shape is real, no number is.

Only configurations are read: those that ship with this package for the models of the presets
(``assets/published``), or those where the model is. The published classes are built in a second,
whatever their size: on the meta device first, where a module can be set up for training, and then
with fake tensors, which compute shapes as tensors of a processor would. On the meta device itself
attention takes another path, with memory for every pair of tokens.
"""

import inspect
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Model
from tempflow_trainer.models import families
from tempflow_trainer.models.base import Conditioning, FlowModel
from tempflow_trainer.models.families.digits import Digits, DigitsPipeline
from tempflow_trainer.models.source import ASSETS, INDEX, configurations


@dataclass(frozen=True)
class Skeleton:
    """The adapter of a model whose tensors have no contents, and what lies beside it."""

    model: FlowModel
    mode: FakeTensorMode
    """The context in which it computes."""
    text_encoders: list[nn.Module]
    autoencoder: nn.Module | None
    dtype: torch.dtype

    def watch(self, *modules: nn.Module) -> None:
        """Give the modules fake tensors, so that they can be run in ``mode``."""
        known: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                known[id(tensor)] = (
                    nn.Parameter(twin, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else twin
                )
            return known[id(tensor)]

        with self.mode:
            for part in [part for module in modules for part in module.modules()]:
                # Some networks keep tables beside their parameters and buffers.
                for place in (part._parameters, part._buffers, vars(part)):
                    for name, value in list(place.items()):
                        if isinstance(value, Tensor):
                            place[name] = fake(value)  # type: ignore[assignment]

    def conditioning(self, rows: int) -> Conditioning:
        """As ``encode`` gives it for so many prompts."""
        shapes = self.model.text_shapes().items()
        with self.mode:
            return Conditioning(
                {name: torch.empty(rows, *shape, dtype=self.dtype) for name, shape in shapes}
            )


def skeleton(model: Model) -> Skeleton:
    """The model of a job, without its weights.

    Raises:
        ModelUnavailable: no configuration can be found, or it is of another model.
    """
    with tempfile.TemporaryDirectory() as cache:
        folder = _configurations(model, Path(cache))
        return _digits(folder, model) if model.family == "digits" else _built(folder, model)


def _built(folder: Path, model: Model) -> Skeleton:
    dtype = getattr(torch, model.precision)
    try:
        index = json.loads((folder / INDEX).read_text())
        parts = _parts(folder, index, dtype)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelUnavailable(
            f"spec.model.source: the configuration of {model.source} cannot be read: {error}"
        ) from error
    adapter = families.adapter_of(model.family)
    pipeline = _pipeline(index, parts)
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    return Skeleton(
        model=adapter(pipeline, max_text_tokens=model.max_text_tokens),
        mode=FakeTensorMode(allow_non_fake_inputs=True),
        text_encoders=encoders,
        autoencoder=parts["vae"],
        dtype=dtype,
    )


def _digits(folder: Path, model: Model) -> Skeleton:
    dtype, mode = getattr(torch, model.precision), FakeTensorMode(allow_non_fake_inputs=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    transformer = _diffusers_part("SD3Transformer2DModel", folder / "transformer").to(dtype)
    encoder = _transformers_part("CLIPTextModel", folder / "text_encoder", torch.float32)
    # Prompts are not read: the tokenizer stays away.
    pipeline = DigitsPipeline(transformer, encoder, None, scheduler)
    adapter = Digits(pipeline, torch.device("cpu"))
    return Skeleton(adapter, mode, [encoder], None, dtype)


def _parts(folder: Path, index: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for name, kind in index.items():
        if name == "scheduler":
            # With real numbers: the schedule is computed from it.
            built[name] = getattr(diffusers, kind[1]).from_pretrained(folder / name)
        elif name in ("transformer", "vae"):
            built[name] = _diffusers_part(kind[1], folder / name).to(dtype)
        elif name.startswith("text_encoder"):
            built[name] = _transformers_part(kind[1], folder / name, dtype)
    return built


def _diffusers_part(kind: str, folder: Path) -> Any:
    known = getattr(diffusers, kind)
    config = known.load_config(folder)
    with torch.device("meta"):
        return known.from_config(config)


def _transformers_part(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        part = getattr(transformers, kind)(config)
    part.to(dtype)
    if dtype == torch.float16:  # as the library loads it: some products of T5 would overflow
        for name, module in part.named_modules():
            if name.rpartition(".")[2] in (part._keep_in_fp32_modules or ()):
                module.float()
    return part


def _pipeline(index: dict[str, Any], parts: dict[str, Any]) -> Any:
    """The pipeline of the adapter; it needs no tokenizer to draw."""
    known = getattr(diffusers, index["_class_name"])
    accepted = inspect.signature(known.__init__).parameters
    # Parts are pairs of library and class; the rest are settings.
    settings = {n: v for n, v in index.items() if n in accepted and not isinstance(v, list)}
    absent = {n: None for n in accepted if n.startswith("tokenizer")}
    return known(**parts, **settings, **absent)


def _configurations(model: Model, cache: Path) -> Path:
    """A folder with the configurations of the model's parts; ``cache`` is for what is fetched."""
    shipped = ASSETS / "published" / model.source.replace("/", "--")
    return shipped if shipped.is_dir() else configurations(model.source, model.revision, cache)
