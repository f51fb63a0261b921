"""What is looked at before a model is loaded: whether these pods can do what the job asks.

A node with a broken GPU or driver, a network that does not carry, or a store that does not answer
ends the attempt within a minute, with a reason of its own, instead of after the download of the
weights. Nothing has been learned then, so it uses none of the job's restarts.
"""

import ctypes
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from tempflow_api.errors import PreflightFailed, TempFlowError
from tempflow_api.v1alpha1 import Compute
from tempflow_trainer.distributed import Ranks

# Long enough for the slowest first connection, short against the hours of a collective in training.
ALL_REDUCE_TIMEOUT = timedelta(seconds=60)
# A bucket as large as many LoRAs: what only breaks beyond one packet breaks here.
ALL_REDUCE_FLOATS = 1 << 20
# NCCL keeps its buffers there; with less it dies of a bus error in the middle of a run.
LEAST_SHARED_BYTES = 64 << 20


def check(
    compute: Compute,
    ranks: Ranks,
    device_of: Callable[[], torch.device],
    probe_store: Callable[[], None],
    shared_memory: Path = Path("/dev/shm"),  # noqa: S108 - the kernel's, not a temporary file
) -> None:
    """All of it, in the order in which one thing needs another.

    Raises:
        PreflightFailed: what is unfit, and what to look at.
    """
    try:
        if compute.device == "cuda":
            check_driver(torch.version.cuda, driver_version())
        device = device_of()
        if device.type == "cuda":
            check_arithmetic(device)
        if compute.processes_per_node > 1:
            check_shared_memory(shared_memory)
        if ranks.world > 1:
            check_all_reduce(ranks, device)
        if ranks.is_first:
            probe_store()
    except PreflightFailed:
        raise
    except TempFlowError as error:
        raise PreflightFailed(f"preflight: {error}") from error


def driver_version() -> int:
    """Of CUDA, as the driver supports it: 12040 is 12.4; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def check_driver(built_for: str | None, driver: int) -> None:
    """Within a major version a newer torch runs on an older driver; across, it does not."""
    if built_for is None:
        raise PreflightFailed(
            "preflight: this torch is built without CUDA; use an image with a CUDA build of torch"
        )
    if driver // 1000 < int(built_for.split(".", maxsplit=1)[0]):
        raise PreflightFailed(
            f"preflight: torch is built for CUDA {built_for}, the node's driver supports "
            f"{driver // 1000}.{driver % 1000 // 10}; update the driver, or use an older image"
        )


def check_arithmetic(device: torch.device) -> None:
    """A GPU that has fallen off its bus, or whose memory is broken, fails at the first kernel."""
    try:
        ones = torch.ones(256, 256, device=device)
        total = float((ones @ ones).sum())
    except RuntimeError as error:
        raise PreflightFailed(f"preflight: {device} fails: {_first_line(error)}") from error
    if total != 256.0**3:
        raise PreflightFailed(f"preflight: {device} computes {total} where {256.0**3} is right")


def check_shared_memory(folder: Path) -> None:
    """Raises PreflightFailed when there is less than NCCL and gloo need."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < LEAST_SHARED_BYTES:
        raise PreflightFailed(
            f"preflight: {folder} has {free >> 20} MiB free, {LEAST_SHARED_BYTES >> 20} are "
            "needed; raise spec.compute.sharedMemory"
        )


def check_all_reduce(ranks: Ranks, device: torch.device) -> None:
    """One sum over all ranks, over the network that training uses, in a group with a short
    patience of its own."""
    values = torch.full((ALL_REDUCE_FLOATS,), float(ranks.rank + 1), device=device)
    try:
        _sum_in_own_group(values)
    except RuntimeError as error:
        raise PreflightFailed(
            f"preflight: rank {ranks.rank} of {ranks.world}: an all-reduce over all ranks fails: "
            f"{_first_line(error)}; look at the network between the nodes and at "
            "spec.compute.network"
        ) from error
    expected = ranks.world * (ranks.world + 1) / 2
    wrong = int((values != expected).sum())
    if wrong:
        raise PreflightFailed(
            f"preflight: rank {ranks.rank}: {wrong} of {len(values)} sums of an all-reduce are not "
            f"{expected:g}"
        )


def _sum_in_own_group(values: Tensor) -> None:
    group = cast(dist.ProcessGroup, dist.new_group(timeout=ALL_REDUCE_TIMEOUT))
    dist.all_reduce(values, group=group)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    dist.destroy_process_group(group)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
