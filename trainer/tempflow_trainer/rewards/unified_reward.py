"""UnifiedReward (arXiv 2503.05236): a vision-language model is asked for a mark from 1 to 5.

The model runs behind any server with the chat interface of OpenAI (vLLM, SGLang); this is its
client.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import torch
from PIL import Image
from torch import Tensor

from tempflow_api.errors import RewardFailed
from tempflow_trainer.rewards.base import Scores
from tempflow_trainer.rewards.transport import (
    Absent,
    Endpoint,
    ServiceFailed,
    Transport,
    Unavailable,
    read_answer,
)
from tempflow_trainer.rewards.wire import picture_of

MODEL = "CodeGoat24/UnifiedReward-7b-v1.5"
SIDE = 512
BEST_MARK = 5.0
MARK = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)(?![\d.]*\d)")

# The model was trained on this question (github.com/CodeGoat24/UnifiedReward, MIT); in other words
# it marks differently.
QUESTION = (
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task "
    "is to evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)


class UnifiedReward:
    """The mark that follows ``Final Score:`` in the answer, divided by 5: 0.2 to 1.

    An answer without a mark is a missing score. ``endpoints`` are base addresses up to ``/v1``,
    separated by commas; ``token_variable`` names an environment variable with the server's key.
    """

    def __init__(
        self,
        endpoints: str = "",
        model: str = MODEL,
        token_variable: str = "",
        timeout_seconds: float = 60.0,
        deadline_seconds: float = 600.0,
        requests_per_endpoint: int = 16,
        max_tokens: int = 512,
    ) -> None:
        """Nothing is asked yet.

        Raises:
            RewardFailed: no endpoint is named, or the key is not in the environment.
        """
        urls = [url.strip().rstrip("/") for url in endpoints.split(",") if url.strip()]
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise RewardFailed(
                f"endpoints: got {endpoints!r}, expected addresses of an OpenAI-compatible server, "
                "for instance http://unified-reward:8000/v1"
            )
        token = os.environ.get(token_variable, "") if token_variable else None
        if token == "":
            raise RewardFailed(f"token_variable: the environment has no {token_variable}")
        self.model, self.max_tokens = model, max_tokens
        self.batch_size = requests_per_endpoint * len(urls)
        self._transport = Transport(
            [Endpoint(url) for url in urls], timeout_seconds, deadline_seconds, token
        )

    def meet(self, stop_requested: Callable[[], bool] = lambda: False) -> None:
        """Ask the servers which models they have.

        Raises:
            Absent: none answers.
            RewardFailed: the model is not there.
            Preempted: asked to stop before there was an answer.
        """
        # An address that is wrong should not take a whole deadline to be seen.
        transport = replace(self._transport, deadline_seconds=self._transport.timeout_seconds)
        try:
            names = transport.background.run(transport.exchange(_models), stop_requested)
        except ServiceFailed as error:
            raise Absent(f"endpoints: the model's server is not there: {error}") from error
        if self.model not in names:
            raise RewardFailed(
                f"model: the server has no {self.model!r}, it has {', '.join(names) or 'none'}"
            )

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Scores:
        """Marks of all images, asked for at once.

        Raises:
            ServiceFailed: an image has no answer by the deadline.
        """
        del metadata
        texts = self._transport.background.run(self._answers(images_N3HW, prompts))
        marks = [mark_of(text) for text in texts]
        return Scores(
            torch.tensor([torch.nan if mark is None else mark / BEST_MARK for mark in marks]),
            {
                i: f"the answer has no mark after 'Final Score:': {text[:200]!r}"
                for i, (text, mark) in enumerate(zip(texts, marks, strict=True))
                if mark is None
            },
        )

    async def _answers(self, images_N3HW: Tensor, prompts: Sequence[str]) -> list[str]:
        asked = [
            self._ask(image, prompt) for image, prompt in zip(images_N3HW, prompts, strict=True)
        ]
        return list(await asyncio.gather(*asked))

    async def _ask(self, image_3HW: Tensor, prompt: str) -> str:
        body = await asyncio.to_thread(self._body, image_3HW, prompt)

        async def ask(session: aiohttp.ClientSession, url: str) -> str:
            async with session.post(
                f"{url}/chat/completions", json=body, allow_redirects=False
            ) as response:
                answer = _parsed(await read_answer(response))
            try:
                return str(answer["choices"][0]["message"]["content"])
            except (KeyError, IndexError, TypeError) as error:
                raise ServiceFailed(f"{url} gives no chat completion: {answer!r:.200}") from error

        return await self._transport.exchange(ask)

    def _body(self, image_3HW: Tensor, prompt: str) -> dict[str, object]:
        picture = picture_of(image_3HW).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": QUESTION.replace("{prompt}", prompt)},
        ]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }


def mark_of(text: str) -> float | None:
    """The mark in an answer, 1 to 5; None if there is none."""
    found = MARK.search(text)
    if found is None or not 1 <= float(found.group(1)) <= BEST_MARK:
        return None
    return float(found.group(1))


async def _models(session: aiohttp.ClientSession, url: str) -> list[str]:
    async with session.get(f"{url}/models", allow_redirects=False) as response:
        answer = _parsed(await read_answer(response))
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError) as error:
        raise ServiceFailed(f"{url} lists no models: {answer!r:.200}") from error


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise Unavailable(f"the reply is not whole JSON: {error}") from error
