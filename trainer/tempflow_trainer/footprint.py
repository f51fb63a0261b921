"""What a model costs, found by running the trainer's own code on tensors without contents.

The forward, the loss and its backward are those of a run; every operation is counted as it passes:
its floating-point operations by torch's own formulas, and the bytes of every tensor as long as it
lives. So nothing here has to know how a network is built.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tempflow_api.v1alpha1 import JobSpec
from tempflow_trainer.experience import Experience, Objective
from tempflow_trainer.models.base import Policy
from tempflow_trainer.models.skeleton import Skeleton
from tempflow_trainer.models.tuning import Tuning


class Watch(TorchDispatchMode):
    """Counts floating-point operations, and the bytes of the tensors that were made inside and are
    still alive: now, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.now, self.peak = 0, 0, 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the signature is torch's
        given = kwargs or {}
        result = func(*args, **given)
        if func.namespace == "prim":  # half of all calls: a tensor is asked for its device
            return result
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **given, out_val=result)
        new = [s for s in _storages((result,)) if id(s) not in self._alive]
        if new:
            # A view, or a tensor that was changed in place, is no new memory.
            old = {id(storage) for storage in _storages((*args, *given.values()))}
            for storage in new:
                if id(storage) not in old:
                    self._note(storage)
        return result

    def _note(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_reference: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: Iterable[Any]) -> Iterator[Any]:
    """Of the tensors among the values and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _storages(value)


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    flops: int
    peak_bytes: int


def cost_of(skeleton: Skeleton, call: Callable[[], object]) -> Cost:
    """Run ``call`` on tensors without contents and watch it."""
    with skeleton.mode, Watch() as watch:
        result = call()
        peak = watch.peak
        del result
    return Cost(watch.flops, peak)


@dataclass(frozen=True)
class Footprint:
    """Calls of a run on a skeleton; ``rows`` count velocities, guided ones once."""

    skeleton: Skeleton
    tuning: Tuning
    spec: JobSpec
    latent_shape: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        skeleton: Skeleton,
        tuning: Tuning,
        spec: JobSpec,
        latent_shape: tuple[int, int, int],
    ) -> "Footprint":
        """Ready to be run; ``tuning`` has set the network up for training."""
        found = cls(skeleton, tuning, spec, latent_shape)
        networks = [skeleton.model.transformer]
        if skeleton.autoencoder is not None:
            networks.append(skeleton.autoencoder)
        if tuning.keeps_reference:
            with tuning.reference(found._policy()) as reference:
                networks.append(reference.model.transformer)
        skeleton.watch(*networks)
        return found

    def forward(self, rows: int) -> Cost:
        """One call of the network without gradient."""
        policy = self._policy()
        latents, sigma, read = self._rows(rows)

        @torch.no_grad()
        def call() -> Tensor:
            return policy.velocity(latents, sigma, read, purpose="rollout")

        return cost_of(self.skeleton, call)

    def update(self, rows: int, draws: int, objective: Objective) -> Cost:
        """Loss and gradient of a micro-batch."""
        policy = self._policy()
        states, sigma, read = self._rows(rows)
        with self.skeleton.mode:
            batch = Experience(
                states_BCHW=states,
                draws_BKCHW=torch.empty(rows, draws, *self.latent_shape),
                advantages_BK=torch.empty(rows, draws),
                group_B=torch.zeros(rows, dtype=torch.long),
                sigma_B=sigma.double(),
                dt_B=sigma.double(),
                x_factor_B=sigma.double(),
                v_factor_B=sigma.double(),
                noise_std_B=sigma.double(),
                weight_B=sigma,
                branch_B=torch.zeros(rows, dtype=torch.long),
            )

        def call() -> None:
            found = objective.loss_sums(batch, policy, read, self.tuning)
            (found["policy"] + objective.kl_coefficient * found["kl"]).backward()

        cost = cost_of(self.skeleton, call)
        gradients = sum(_bytes(p.grad) for p in self.tuning.parameters().values())
        for parameter in self.tuning.parameters().values():
            parameter.grad = None
        # They are counted once for the whole update.
        return Cost(cost.flops, cost.peak_bytes - gradients)

    def decode(self, rows: int) -> Cost:
        """Images of so many latents."""
        latents, _, _ = self._rows(rows)
        return cost_of(self.skeleton, lambda: self.skeleton.model.decode(latents))

    def rows_per_velocity(self, purpose: str) -> int:
        """2 with classifier-free guidance."""
        return self._policy().rows_per_velocity(purpose)

    def _policy(self) -> Policy:
        model = self.skeleton.model
        return Policy(
            model,
            self.spec.sampling.guidance_scale,
            self.skeleton.conditioning(1) if model.classifier_free else None,
            torch.device("cpu"),
            text=model,
            training_guidance_scale=self.spec.sampling.training_guidance_scale,
            unconditional_gradient=self.spec.algorithm.guidance_gradient == "both",
        )

    def _rows(self, rows: int) -> tuple[Tensor, Tensor, Any]:
        read = self.skeleton.conditioning(rows)
        with self.skeleton.mode:
            return torch.empty(rows, *self.latent_shape), torch.empty(rows), read


def weight_bytes(module: torch.nn.Module) -> int:
    """Of the parameters and buffers of a module."""
    return sum(map(_bytes, [*module.parameters(), *module.buffers()]))


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
