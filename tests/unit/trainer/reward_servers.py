"""Real reward services on loopback, in a thread of the test's process, and scorers to serve."""

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from tempflow_api.v1alpha1 import RewardService, RewardTerm
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Reward, Scorer, Scores, Term
from tempflow_trainer.rewards.serve import Limits, Service

Metadata = Sequence[Mapping[str, object]]


@dataclass
class Red:
    """The mean of the red channel; remembers the size of each call, and may be slow."""

    batch_size: int = 8
    seconds: float = 0.0
    group_wise: bool = False
    calls: list[int] = field(default_factory=list)

    def score(self, images_N3HW: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        assert len(images_N3HW) == len(prompts) == len(metadata)
        self.calls.append(len(prompts))
        time.sleep(self.seconds)
        return images_N3HW[:, 0].mean(dim=(1, 2))


@dataclass
class Moody(Red):
    """Does what the prompt says: 'raise', 'nan', 'missing', or anything else for a score."""

    def score(  # type: ignore[override]
        self, images_N3HW: Tensor, prompts: Sequence[str], metadata: Metadata
    ) -> Scores:
        if "raise" in prompts:
            raise RuntimeError("a mood")
        values = super().score(images_N3HW, prompts, metadata)
        if "nan" in prompts:
            values[prompts.index("nan")] = torch.nan
        return Scores(values, {i: "no face found" for i, p in enumerate(prompts) if p == "missing"})


def reds(*levels: int) -> Tensor:
    """One picture a level: red of that 8-bit level, with the place of a pixel in green."""
    pictures = torch.zeros(len(levels), 3, 5, 7, dtype=torch.uint8)
    pictures[:, 0] = torch.tensor(levels, dtype=torch.uint8)[:, None, None]
    pictures[:, 1] = torch.arange(35, dtype=torch.uint8).view(5, 7)
    return pictures


@contextmanager
def running(app: web.Application, port: int = 0) -> Iterator[str]:
    """The address of a server that runs ``app`` in a thread until the context ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[web.AppRunner, str]:
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    runner, url = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield url
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def served(
    scorer: Scorer,
    limits: Limits | None = None,
    token: str | None = None,
    name: str = "red",
    port: int = 0,
) -> Iterator[tuple[str, Service]]:
    """The address of a service of ``scorer``, and the service."""
    service = Service(Term(name, 1.0, scorer), limits or Limits(), token)
    with running(service.app(), port) as url:
        yield url, service


def remote(*urls: str, name: str = "red", **settings: Any) -> Reward:
    """A job's reward that asks these addresses, with short times unless said otherwise."""
    times = {"timeoutSeconds": 2.0, "deadlineSeconds": 4.0}
    service = RewardService.model_validate({"endpoints": list(urls), **times, **settings})
    return registry.build([RewardTerm(name=name, service=service)])


def score(reward: Reward, *levels: int, prompts: Sequence[str] | None = None) -> list[float]:
    """The scores of a picture a level."""
    texts = prompts or [f"prompt {level}" for level in levels]
    [scores] = reward.score(reds(*levels), texts, [{} for _ in levels]).values()
    return [round(value * 255, 3) for value in scores.tolist()]
