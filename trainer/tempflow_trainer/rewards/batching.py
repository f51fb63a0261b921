"""One queue of pictures in front of a scorer: requests are scored together, within bounds.

Everything here runs in one event loop, but the scorer, which runs in one thread: few scorers bear
two calls at once, and those that compute on a GPU gain nothing by it.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempflow_trainer.rewards.base import Scorer, Scores, as_floats, is_group_wise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A picture, uint8 [3, H, W], with what belongs to it."""

    image_3HW: Tensor
    prompt: str
    metadata: Mapping[str, object]


Answer = float | str
"""A score, or the reason why there is none."""


class QueueFull(Exception):
    """There is no room; the caller may ask again later."""


class ScorerFailed(Exception):
    """The scorer raised, or gave what is no score."""


@dataclass
class _Request:
    samples: Sequence[Sample]
    future: asyncio.Future[list[Answer]]


@dataclass
class Batcher:
    """Scores samples of many callers in batches of at most ``scorer.batch_size``.

    A batch begins with what has waited longest. It starts when it is full, or ``linger_seconds``
    after the scorer became free with something to do.
    """

    scorer: Scorer
    capacity: int
    """Most pictures that wait or are being scored."""
    linger_seconds: float
    on_batch: Callable[[int, float], None] = lambda _images, _seconds: None
    """Hears the size of each batch and the seconds that it took."""
    held: int = 0
    """Pictures that wait or are being scored."""
    _waiting: deque[_Request] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="scorer")
    )

    @contextmanager
    def room(self, images: int) -> Iterator[None]:
        """Hold room for ``images`` more, from before they are unpacked until they are scored.

        Raises:
            QueueFull: not now.
        """
        self.check_room(images)
        self.held += images
        try:
            yield
        finally:
            self.held -= images

    def check_room(self, images: int) -> None:
        """Whether ``images`` more may come.

        Raises:
            QueueFull: not now.
        """
        if self.held + images > self.capacity:
            raise QueueFull(
                f"{self.held} of {self.capacity} pictures wait, no room for {images} more"
            )

    async def score(self, samples: Sequence[Sample]) -> list[Answer]:
        """One answer a sample, in order; the caller holds ``room`` for them.

        Raises:
            ScorerFailed: no sample of this call has a score.
        """
        request = _Request(samples, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._news.set()
        return await request.future

    async def run(self) -> None:
        """Score what comes, until cancelled."""
        while True:
            await self._news.wait()
            if self._pictures() < self.scorer.batch_size and not is_group_wise(self.scorer):
                await asyncio.sleep(self.linger_seconds)
            batch = self._take()
            if not self._waiting:
                self._news.clear()
            if batch:
                await self._score(batch)

    def _pictures(self) -> int:
        return sum(len(r.samples) for r in self._waiting if not r.future.cancelled())

    def _take(self) -> list[_Request]:
        """Whole requests, as many as fit into a batch; a larger one is a batch by itself. A group
        is never scored with another one."""
        batch: list[_Request] = []
        room = self.scorer.batch_size
        while self._waiting:
            request = self._waiting[0]
            if not request.future.cancelled():
                if batch and (is_group_wise(self.scorer) or len(request.samples) > room):
                    break
                batch.append(request)
                room -= len(request.samples)
            self._waiting.popleft()
        return batch

    async def _score(self, batch: Sequence[_Request]) -> None:
        """Answer every request; one whose pictures make the scorer fail harms no other."""
        samples = [sample for request in batch for sample in request.samples]
        try:
            answers = await self._in_thread(samples)
        except ScorerFailed as error:
            if len(batch) > 1:
                for request in batch:
                    await self._score([request])
            elif not batch[0].future.done():
                log.warning("%s", error)
                batch[0].future.set_exception(error)
            return
        for request in batch:
            mine, answers = answers[: len(request.samples)], answers[len(request.samples) :]
            if not request.future.done():
                request.future.set_result(mine)

    async def _in_thread(self, samples: Sequence[Sample]) -> list[Answer]:
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        answers = await loop.run_in_executor(self._thread, answers_of, self.scorer, samples)
        self.on_batch(len(samples), time.perf_counter() - start)
        return answers


def answers_of(scorer: Scorer, samples: Sequence[Sample]) -> list[Answer]:
    """The scorer's answers; pictures of one size are scored together.

    Raises:
        ScorerFailed: an exception, another number of scores, or one that is not finite and has
            no reason.
    """
    answers: dict[int, Answer] = {}
    by_size: dict[torch.Size, list[int]] = {}
    for index, sample in enumerate(samples):
        by_size.setdefault(sample.image_3HW.shape, []).append(index)
    if is_group_wise(scorer) and len(by_size) > 1:
        raise ScorerFailed("the pictures of a group differ in size")
    for indices in by_size.values():
        size = len(indices) if is_group_wise(scorer) else scorer.batch_size
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            found = _call(scorer, [samples[i] for i in part])
            answers.update(zip(part, found, strict=True))
    return [answers[i] for i in range(len(samples))]


def _call(scorer: Scorer, samples: Sequence[Sample]) -> list[Answer]:
    images = as_floats(torch.stack([sample.image_3HW for sample in samples]))
    prompts = [sample.prompt for sample in samples]
    try:
        with torch.no_grad():
            found = scorer.score(images, prompts, [sample.metadata for sample in samples])
    except Exception as error:  # a plug-in may raise anything; the service must say so and live on
        raise ScorerFailed(f"{type(error).__name__}: {error}") from error
    values, failed = (found.values_N, found.failed) if isinstance(found, Scores) else (found, {})
    if values.shape != (len(samples),):
        raise ScorerFailed(
            f"gave scores of shape {list(values.shape)} for {len(samples)} images, expected [N]"
        )
    answers: list[Answer] = []
    for index, value in enumerate(values.tolist()):
        if index in failed:
            answers.append(failed[index])
        elif not torch.isfinite(torch.tensor(value)):
            raise ScorerFailed(f"gave {value} for an image of prompt {prompts[index]!r}")
        else:
            answers.append(float(value))
    return answers
