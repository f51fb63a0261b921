"""A device that is not the processor, for machines that have none: ``pretended:0``.

Its memory and its kernels are the processor's, so it computes the same numbers; but a tensor is on
the one or on the other, and an operation that mixes them fails as it would beside a GPU. torch
knows one such device in a process, so this belongs into a process of its own.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as trees
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"

_aten = torch.ops.aten
_MOVES = (_aten._to_copy, _aten.copy_)
# Their second argument are the indices, which a GPU takes from the processor as well.
_INDEXES = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
# Views with a mark that only a layer above this one reads.
_FOR_MARKS = {
    _aten._conj.default: _aten._conj_physical.default,
    _aten._neg_view.default: _aten.neg.default,
}


class Mixed(RuntimeError):
    """Tensors of two devices met in one operation."""


class _There(torch.Tensor):
    """A tensor on the device, around the one that has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "_There":
        there: _There = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        there.held = values
        return there

    def __repr__(self) -> str:  # type: ignore[override]  # of torch, which is not typed
        return f"there({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # of torch, which says less of it
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        return _compute(operation, *args, **(kwargs or {}))


def _compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """On the processor; what is new is on the device, unless it was asked for elsewhere."""
    if operation.overloadpacket not in _MOVES:
        indexes = operation.overloadpacket in _INDEXES and isinstance(args[0], _There)
        _require_one_device(operation, (args[0], *args[2:]) if indexes else (args, kwargs))
    given, shape = trees.tree_flatten((args, kwargs))
    known = {id(x.held): x for x in given if isinstance(x, _There)}
    asked_for = next((x for x in given if isinstance(x, torch.device)), None)
    elsewhere = asked_for is not None and asked_for.type != NAME

    def came_from(value: Any) -> Any:
        if not _is_tensor(value) or elsewhere:
            return value
        return known[id(value)] if id(value) in known else _There(value)

    args, kwargs = trees.tree_unflatten([_on_processor(x) for x in given], shape)
    return trees.tree_map(came_from, _FOR_MARKS.get(operation, operation)(*args, **kwargs))


def _require_one_device(operation: Any, arguments: Any) -> None:
    """Numbers without a dimension go anywhere."""
    given = [x for x in trees.tree_leaves(arguments) if _is_tensor(x)]
    here = [x for x in given if not isinstance(x, _There) and x.ndim > 0]
    if here and any(isinstance(x, _There) for x in given):
        raise Mixed(f"{operation}: {[tuple(x.shape) for x in here]} are not on {NAME}:0")


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    """``copy_`` to and from the device, as torch asks a device for it."""
    del non_blocking
    _on_processor(target).copy_(_on_processor(source))
    return target


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _on_processor(value: Any) -> Any:
    if isinstance(value, _There):
        return value.held
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


class _Module:
    """What torch asks of ``torch.pretended``, as it asks ``torch.cuda``."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, index: int) -> Any:
        del index
        return nullcontext()

    def manual_seed_all(self, seed: int) -> None:
        """There is one generator, the processor's."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        del device
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        del device
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def make() -> torch.device:
    """The device; from now on this process has it."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for operation in (_aten.empty.memory_format, _aten.empty_strided.default):
        # What makes a tensor from nothing ends in one of these two.
        library.impl(operation, partial(_compute, operation), "PrivateUse1")
    library.impl(_aten._copy_from.default, _copy_from, "PrivateUse1")
    _KEPT.append(library)  # it is unregistered when nobody holds it
    # A module's parameters become another class of tensor.
    torch.__future__.set_swap_module_params_on_conversion(True)
    return torch.device(NAME, 0)


_KEPT: list[torch.library.Library] = []
