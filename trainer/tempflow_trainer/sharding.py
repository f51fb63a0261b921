"""Weights in parts (FSDP2): every rank holds its share, and a block is whole only while it runs.

A sharded parameter is a ``DTensor``: it has the shape of the whole, and its rank's rows. Code that
only computes on parameters need not care; this module is for the few places that exchange whole
tensors with the outside.

Forward and backward exchange weights, so every rank has to make the same number of calls.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, *, world: int, device: torch.device, widen: bool) -> None:
    """Leave this rank its share of the parameters, which must be equal on all ranks before.

    The units that are gathered are the members of the network's lists of blocks, and what remains.
    One after the other becomes float32 if ``widen``, and goes to ``device``, where its share alone
    stays: the network may be anywhere before, and is never whole there. Gradients become sums over
    the ranks, as the loss is divided by the rows of all of them.
    """
    mesh = init_device_mesh(device.type, (world,))
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    for unit in (*(block for blocks in lists for block in blocks), network):
        if widen:
            unit.float()
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # The sum by a sum, where the device's own kinds of mean could be used instead.
            module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, detached. Where it is in parts all ranks have to ask."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(values: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU where they were in parts; nothing on a rank that does not
    keep them. All ranks have to ask."""
    found = {}
    for name, value in values.items():
        tensor = whole(value)
        if keep:
            found[name] = tensor.cpu() if isinstance(value, DTensor) else tensor
    return found


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor that every rank has, in parts as the parameter's."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    placed = value.to(parameter.device, parameter.dtype)
    # Each rank cuts its own part out of what it has; nothing is sent.
    return distribute_tensor(
        placed, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients down to a norm of ``most`` over all ranks' parts; the norm before."""
    listed = list(parameters)
    norm = whole(nn.utils.get_total_norm([p.grad for p in listed if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(listed, most, norm)
    return norm


def bytes_held(network: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters on this rank, and of the whole network."""
    here = everywhere = 0
    for parameter in network.parameters():
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here += part.numel() * part.element_size()
        everywhere += parameter.numel() * parameter.element_size()
    return here, everywhere
