"""Every random number of a run is derived from its seed and from what the number is for.

No generator is carried from one draw to the next: a rollout can be repeated, resumed or spread
over any number of processes and the same draw gets the same noise.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(run_seed: int, *what: int | str) -> int:
    """A 63-bit seed for the draw that ``what`` names, for instance ("noise", epoch, prompt)."""
    text = "/".join(str(part) for part in (run_seed, *what))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(run_seed: int, *what: int | str) -> torch.Generator:
    """A CPU generator, so that the numbers are the same on every device.

    Torch keeps the low 32 bits of the seed: two given draws are equal with a chance of 2^-32.
    """
    return torch.Generator().manual_seed(derive(run_seed, *what))


def normal(shape: Sequence[int], run_seed: int, *what: int | str) -> Tensor:
    """Standard normal float32 of ``shape``, on the CPU."""
    return torch.randn(tuple(shape), generator=generator(run_seed, *what))


def permutation(length: int, run_seed: int, *what: int | str) -> list[int]:
    """The numbers below ``length`` in random order."""
    order: list[int] = torch.randperm(length, generator=generator(run_seed, *what)).tolist()
    return order
