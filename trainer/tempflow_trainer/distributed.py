"""The ranks of a run: who they are, and the few things they tell each other."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tempflow_api.errors import TempFlowError, of_code

# A reward may be slow; a rank that waits for its peers is not a rank that hangs.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` processes. Without peers every call is local and free."""

    rank: int
    world: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        """Rank 0 writes metrics and checkpoints."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add the tensors of all ranks, in place, in one message."""
        if self.world == 1:
            return
        parts = list(tensors)
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        for part, summed in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
            part.copy_(summed.view_as(part))

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """The CPU tensors of all ranks, in order of rank; they may differ in shape, not in rank
        or type."""
        if self.world == 1:
            return [rows]
        shapes = [torch.zeros(rows.ndim, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(shapes, torch.tensor(rows.shape))
        sizes = [int(shape.prod()) for shape in shapes]
        # Messages of one length, so that plain collectives do: object collectives would unpickle
        # what comes from the network.
        mine = torch.zeros(max(sizes), dtype=rows.dtype)
        mine[: rows.numel()] = rows.flatten()
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        return [
            part[:size].view(shape.tolist())
            for part, size, shape in zip(parts, sizes, shapes, strict=True)
        ]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on some rank. Every rank gets the same answer."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)

    def from_first(self, text: str) -> str:
        """The text that rank 0 has, on every rank."""
        if self.world == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor(len(content))
        dist.broadcast(length, src=0)
        if self.rank != 0:
            content = torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        return bytes(content.tolist()).decode()

    def on_first(self, action: Callable[[], str]) -> str:
        """What ``action`` returns on rank 0, on every rank; its error is raised on every rank."""
        answer: dict[str, str | int] = {}
        if self.is_first:
            try:
                answer = {"value": action()}
            except TempFlowError as error:
                answer = {"code": int(error.exit_code), "message": str(error)}
        answer = json.loads(self.from_first(json.dumps(answer)))
        if "code" in answer:
            raise of_code(int(answer["code"]), str(answer["message"]))
        return str(answer["value"])

    def agreed(self, question: Callable[[], bool]) -> bool:
        """Rank 0's answer, on every rank."""
        return self.on_first(lambda: "yes" if question() else "") == "yes"


def join() -> Ranks:
    """Meet the other ranks at the address that torchrun put into the environment."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return Ranks(rank, world, int(os.environ.get("LOCAL_RANK", "0")))


def leave() -> None:
    """Close the connections."""
    if dist.is_initialized():
        dist.destroy_process_group()
