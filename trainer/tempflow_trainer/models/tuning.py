"""Which weights are trained: a low-rank update, or all of them.

Both keep trained weights in float32, can run the model as it was before training, and export in
the form that diffusers loads.
"""

import copy
import difflib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow_api import checkpoint_layout as layout
from tempflow_api.errors import ModelUnavailable
from tempflow_api.v1alpha1 import Lora
from tempflow_trainer import seeds, sharding
from tempflow_trainer.distributed import Ranks
from tempflow_trainer.models.base import FlowModel, Policy

log = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"


class Tuning(ABC):
    """The trained weights of a model."""

    sharded = False
    """Whether each rank holds a part of them; their gradients are sums over the ranks then."""
    keeps_reference = False
    """Whether the model before training is a second copy of it."""
    widens = False
    """Whether all weights are to be float32, where the model's may be of another type."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, float32."""

    @abstractmethod
    def reference(self, policy: Policy) -> AbstractContextManager[Policy]:
        """A context in which the policy is the model before training."""

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """What may be held in parts: the network, and the one before training if there is one."""

    def shard(self, ranks: Ranks, device: torch.device) -> None:
        """Leave this rank its part of every weight; before the optimizer is made."""
        for network in self.networks():
            sharding.shard(network, world=ranks.world, device=device, widen=self.widens)
            here, everywhere = sharding.bytes_held(network)
            log.info("holds %d of %d bytes of weights", here, everywhere)
        self.sharded = True

    @abstractmethod
    def export(self, folder: Path, values: dict[str, Tensor] | None = None) -> None:
        """Write whole weights below ``folder`` in the form that diffusers loads.

        ``values`` are whole tensors by the names of the parameters; without them the current
        weights, which all ranks have to ask for where they are sharded.
        """

    def _whole(self) -> dict[str, Tensor]:
        return sharding.gathered(self.parameters(), keep=True)

    @contextmanager
    def values(self, values: dict[str, Tensor]) -> Iterator[None]:
        """A context in which the parameters have other values, for instance their average."""
        parameters = self.parameters()
        trained = {name: p.detach().clone() for name, p in parameters.items()}
        self.assign(values)
        try:
            yield
        finally:
            self.assign(trained)

    @torch.no_grad()
    def assign(self, values: dict[str, Tensor]) -> None:
        """Set every parameter.

        Raises:
            ValueError: names or shapes that are not those of the parameters.
        """
        parameters = self.parameters()
        if values.keys() != parameters.keys():
            odd = sorted(values.keys() ^ parameters.keys())[:3]
            raise ValueError(f"weights are of another model: {odd} and perhaps more do not match")
        for name, parameter in parameters.items():
            if values[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {list(values[name].shape)}, expected {list(parameter.shape)}"
                )
            parameter.copy_(sharding.like(values[name], parameter))


class LoraTuning(Tuning):
    """A low-rank update beside the frozen projections (diffusers' and peft's own)."""

    def __init__(self, model: FlowModel, lora: Lora, run_seed: int) -> None:
        """Freeze the model and add the update, which is zero at first.

        Raises:
            ModelUnavailable: a target that matches no projection, with near names.
        """
        self._transformer = model.transformer.requires_grad_(False)
        targets = resolve_targets(model.transformer, lora.targets or list(model.lora_targets))
        self._config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=targets,
            init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(run_seed, "lora"))
            self._transformer.add_adapter(self._config)
        for _, parameter in self._trainable():
            parameter.data = parameter.data.float()

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._transformer.named_parameters() if p.requires_grad]

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._trainable())

    @contextmanager
    def reference(self, policy: Policy) -> Iterator[Policy]:
        layers = [m for m in self._transformer.modules() if isinstance(m, LoraLayer)]
        for layer in layers:
            layer.enable_adapters(enabled=False)
        try:
            yield policy
        finally:
            for layer in layers:
                layer.enable_adapters(enabled=True)

    def networks(self) -> list[nn.Module]:
        return [self._transformer]

    def export(self, folder: Path, values: dict[str, Tensor] | None = None) -> None:
        # Without its configuration as metadata a loader takes alpha to be the rank.
        update = get_peft_model_state_dict(
            self._transformer, state_dict=self._whole() if values is None else values
        )
        config = {k: _plain(v) for k, v in self._config.to_dict().items()}
        metadata = {f"transformer.{key}": value for key, value in config.items()}
        target = folder / layout.ADAPTER
        target.mkdir(parents=True, exist_ok=True)
        save_file(
            {f"transformer.{k}": v.detach().cpu().contiguous() for k, v in update.items()},
            target / LORA_FILE,
            # One entry only: safetensors writes several in random order, and equal weights would
            # give unequal files.
            metadata={"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)},
        )


class FullTuning(Tuning):
    """Every weight of the transformer."""

    widens = True

    def __init__(
        self, model: FlowModel, *, keep_reference: bool, to_be_sharded: bool = False
    ) -> None:
        """``keep_reference`` holds a frozen copy for the KL.

        The network becomes float32 here, or block by block in ``shard`` if that is to follow: whole
        it may be more than there is memory for.
        """
        self._kind = type(model.transformer)
        if not to_be_sharded:
            model.transformer.float()
        self._transformer = model.transformer.requires_grad_(True)
        self._model = model
        self.keeps_reference = keep_reference
        self._reference: nn.Module | None = None
        if keep_reference:
            self._reference = _frozen_copy(model.transformer, same_memory=to_be_sharded)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._transformer.named_parameters())

    @contextmanager
    def reference(self, policy: Policy) -> Iterator[Policy]:
        if self._reference is None:
            raise ValueError("no reference was kept")
        model = copy.copy(self._model)
        model.transformer = self._reference
        yield replace(policy, model=model)  # shares the counters

    def networks(self) -> list[nn.Module]:
        return [self._transformer, *([self._reference] if self._reference is not None else [])]

    def export(self, folder: Path, values: dict[str, Tensor] | None = None) -> None:
        # The class of a sharded network is another one, and its tensors are parts: the file is
        # written by a network without weights of its own that is given the whole ones.
        trained = self._whole() if values is None else values
        with torch.device("meta"):
            network = self._kind.from_config(self._transformer.config)
        buffers = {k: v for k, v in self._transformer.state_dict().items() if k not in trained}
        network.load_state_dict({**buffers, **trained}, assign=True)
        network.save_pretrained(folder / layout.TRANSFORMER)


def _frozen_copy(network: nn.Module, *, same_memory: bool) -> nn.Module:
    """``same_memory``: until the weights of either are replaced, as ``shard`` does."""
    twins = {id(p): nn.Parameter(p.data, requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, twins if same_memory else {}).requires_grad_(False)


def load_result(model: FlowModel, folder: Path) -> None:
    """Apply an exported result, an ``adapter`` or a ``transformer`` folder, to ``model``.

    Raises:
        ModelUnavailable: neither is there, damaged, or it is of another model.
    """
    adapter, transformer = folder / layout.ADAPTER / LORA_FILE, folder / layout.TRANSFORMER
    if adapter.is_file():
        with _as_unavailable(adapter):
            _load_adapter(model, adapter)
    elif transformer.is_dir():
        with _as_unavailable(transformer):
            trained = type(model.transformer).from_pretrained(transformer)
            model.transformer = trained.to(model.transformer.device).eval()
    else:
        raise ModelUnavailable(
            f"{folder} holds no result: expected {layout.ADAPTER}/{LORA_FILE} or "
            f"{layout.TRANSFORMER}/"
        )


@contextmanager
def _as_unavailable(place: Path) -> Iterator[None]:
    """What the libraries raise for files that are missing, cut, or made for another model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ModelUnavailable(f"{place} cannot be loaded into this model: {text}") from error


def _load_adapter(model: FlowModel, file: Path) -> None:
    model.transformer.load_lora_adapter(
        load_file(file), prefix="transformer", metadata=_metadata(file)
    )


def _metadata(file: Path) -> dict[str, object]:
    with safe_open(file, framework="pt") as opened:
        stored: dict[str, object] = json.loads(
            (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
        )
    return stored


def resolve_targets(transformer: nn.Module, targets: list[str]) -> list[str]:
    """The targets as peft takes them: names stay, an expression becomes the paths that it matches.

    Raises:
        ModelUnavailable: a target that matches no projection, with near names.
    """
    paths = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    found: list[str] = []
    for target in targets:
        is_expression = len(target) > 2 and target[0] == target[-1] == "/"
        matching = _expression_matches(target, paths) if is_expression else [target]
        if not any(p == name or p.endswith(f".{name}") for name in matching for p in paths):
            raise ModelUnavailable(
                f"spec.model.lora.targets: {target!r} matches no projection of the model; near "
                f"names are {', '.join(_near(target.strip('/'), paths))}"
            )
        found += matching
    return list(dict.fromkeys(found))


def _expression_matches(target: str, paths: list[str]) -> list[str]:
    try:
        expression = re.compile(target[1:-1])
    except re.error as error:
        raise ModelUnavailable(
            f"spec.model.lora.targets: {target!r} is not a regular expression: {error}"
        ) from error
    return [path for path in paths if expression.fullmatch(path)]


def _near(target: str, paths: list[str]) -> list[str]:
    ends = sorted({".".join(p.split(".")[-2:]) for p in paths} | {p.split(".")[-1] for p in paths})
    return difflib.get_close_matches(target, ends, n=3, cutoff=0.3) or ends[:3]


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else value
