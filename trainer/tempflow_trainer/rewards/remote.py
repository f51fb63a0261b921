"""A reward that a service scores: the client of ``serve.py``.

What the server sends is checked before it is believed: as many scores as images, the ids that were
asked for in their order, numbers that are finite. A reply that fails this is an error at once; a
server that does not answer is asked again until the deadline (``transport.py``).
"""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NoReturn

import aiohttp
import torch
from pydantic import ValidationError
from torch import Tensor

from tempflow_api import naming
from tempflow_api.errors import RewardFailed
from tempflow_api.v1alpha1 import RewardService, RewardTerm
from tempflow_trainer.rewards import wire
from tempflow_trainer.rewards.base import Scores
from tempflow_trainer.rewards.transport import (
    Absent,
    Endpoint,
    ServiceFailed,
    Transport,
    Unavailable,
    read_answer,
)

log = logging.getLogger(__name__)

_calls = count()


@dataclass
class RemoteScorer:
    """Scores by asking the endpoints of ``service`` for the reward ``serves``.

    One that was not there when it was met is asked again with each call of ``score``.
    """

    serves: str
    service: RewardService
    transport: Transport = field(repr=False)
    placed: bool = False
    """The operator starts it together with the run."""
    description: wire.Description | None = None
    """What the service says of itself, once it has."""

    def meet(self, stop_requested: Callable[[], bool] = lambda: False) -> wire.Description:
        """Ask the service what it is, and remember it.

        Raises:
            Absent: nobody answers.
            RewardFailed: another reward is served.
            Preempted: asked to stop before there was an answer.
        """
        # One that starts with the run has its image to pull and its model to load. An address that
        # is wrong should not take so long to be seen.
        if self.placed:
            transport = self.transport.patient(self.service.deadline_seconds)
        else:
            transport = replace(self.transport, deadline_seconds=self.service.timeout_seconds)
        try:
            found = transport.background.run(transport.exchange(_describe), stop_requested)
        except ServiceFailed as error:
            raise Absent(
                f"the service of reward {self.serves} is not there: {error}; {self._remedy}"
            ) from error
        if found.reward != self.serves:
            raise RewardFailed(
                f"{', '.join(self.service.endpoints)} serves the reward {found.reward!r}, expected "
                f"{self.serves!r}: correct service.endpoints, or name the reward in 'uses'"
            )
        log.info("reward %s is served by %s", found.reward, ", ".join(self.service.endpoints))
        self.description = found
        return found

    @property
    def _remedy(self) -> str:
        if self.placed:
            return (
                "its pods have the label tempflow.dev/reward: see kubectl describe and logs; if it "
                "takes longer to start, raise service.deadlineSeconds"
            )
        return "start it (python -m tempflow_trainer.rewards.serve) or correct service.endpoints"

    @property
    def group_wise(self) -> bool:
        """As the served reward is; False while that is not known."""
        return self.description is not None and self.description.group_wise

    @property
    def batch_size(self) -> int:
        """As many images as can be under way at once."""
        if self.description is not None and self.description.group_wise:
            return self.description.max_images
        requests = self.service.requests_per_endpoint * len(self.service.endpoints)
        return self._images_per_request * requests

    @property
    def _images_per_request(self) -> int:
        most = self.service.images_per_request
        return min(most, self.description.max_images) if self.description else most

    def score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Scores:
        """The scores of the service; those it says it cannot give are missing.

        Raises:
            Absent: it was not there before, and still is not.
            ServiceFailed: no answer by the deadline, a refusal, or an answer that is none.
        """
        if self.description is None and self.meet().group_wise:
            # Only now is it known; these images are no group, the next call's are one.
            raise ServiceFailed(f"the reward {self.serves} compares groups, which is known now")
        size = len(prompts) if self.group_wise else self._images_per_request
        return self.transport.background.run(self._score(images_N3HW, prompts, metadata, size))

    async def _score(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
        size: int,
    ) -> Scores:
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._request(images_N3HW[r], prompts[r], metadata[r]))
                    for r in parts
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        values: list[float] = []
        failed: dict[int, str] = {}
        for found in [score for task in tasks for score in task.result()]:
            if found.score is None:
                failed[len(values)] = found.error or "the service gives no reason"
            values.append(torch.nan if found.score is None else found.score)
        return Scores(torch.tensor(values, dtype=torch.float32), failed)

    async def _request(
        self,
        images_N3HW: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> list[wire.ItemScore]:
        asked = wire.request_of(prompts, metadata, call=f"{os.getpid()}-{next(_calls)}")
        files = await asyncio.to_thread(
            lambda: [wire.encode_image(i, self.service.image_format) for i in images_N3HW]
        )

        found: list[wire.ItemScore] = []
        for part in self._parts(asked, files):
            some = asked.model_copy(update={"items": asked.items[part]})
            found += await self.transport.exchange(self._asking(some, files[part]))
        return found

    def _parts(self, asked: wire.ScoreRequest, files: Sequence[bytes]) -> list[slice]:
        """The requests into which the server's bound of bytes cuts one; a group stays whole."""
        most = self.description.max_bytes if self.description else None
        if most is None or self.group_wise:
            return [slice(0, len(files))]
        return wire.requests_within(
            [len(file) for file in files], most - len(asked.json_bytes()) - wire.PART_BYTES
        )

    def _asking(
        self, asked: wire.ScoreRequest, files: Sequence[bytes]
    ) -> Callable[[aiohttp.ClientSession, str], Awaitable[list[wire.ItemScore]]]:
        async def ask(session: aiohttp.ClientSession, url: str) -> list[wire.ItemScore]:
            body = _form(asked, files, self.service.image_format)
            async with session.post(
                url + wire.SCORE_PATH, data=body, allow_redirects=False
            ) as response:
                return scores_of(await read_answer(response), asked, url)

        return ask


def scores_of(body: bytes, asked: wire.ScoreRequest, url: str) -> list[wire.ItemScore]:
    """The scores in a reply, one for each item that was asked for, in order.

    Raises:
        Unavailable: the reply ends in the middle.
        ServiceFailed: it is whole, but no answer to what was asked.
    """

    def refuse(text: str) -> NoReturn:
        raise ServiceFailed(f"{url} gives a score of {text}; a score must be finite")

    try:
        reply = wire.ScoreReply.model_validate(json.loads(body, parse_constant=refuse))
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"])
        raise ServiceFailed(f"{url} answers with no scores: {where}: {found['msg']}") from error
    except ValueError as error:  # includes a character that is cut in two
        raise Unavailable(f"the reply is not whole JSON: {error}") from error
    if len(reply.scores) != len(asked.items):
        raise ServiceFailed(f"{url} gives {len(reply.scores)} scores for {len(asked.items)} images")
    for position, (score, item) in enumerate(zip(reply.scores, asked.items, strict=True)):
        if score.id != item.id:
            raise ServiceFailed(
                f"{url} answers out of order: score {position} has id {score.id!r}, expected "
                f"{item.id!r}"
            )
    return reply.scores


def of_term(term: RewardTerm, path: str) -> RemoteScorer:
    """The client for a term that is served; nothing is asked yet.

    Raises:
        RewardFailed: the token, or the address that the operator gives, is not in the environment.
    """
    service, placed = term.service or RewardService(), term.placement == "service"
    if placed:
        service = service.model_copy(update={"endpoints": [_given_address(term, path)]})
    token = None
    if service.token_variable is not None:
        token = os.environ.get(service.token_variable)
        if not token:
            raise RewardFailed(
                f"{path}.service.tokenVariable: the environment has no {service.token_variable}; "
                "set it, on a cluster in the Secret that compute.secretName names"
            )
    endpoints = [Endpoint(url.rstrip("/")) for url in service.endpoints]
    transport = Transport(endpoints, service.timeout_seconds, service.deadline_seconds, token)
    return RemoteScorer(term.uses or term.name, service, transport, placed)


def _given_address(term: RewardTerm, path: str) -> str:
    given = json.loads(os.environ.get(naming.ENV_REWARD_ENDPOINTS, "{}"))
    if term.name not in given:
        raise RewardFailed(
            f"{path}.placement: got service, and nobody serves {term.name} here; on a cluster the "
            "operator does. Leave placement out, or serve the reward and give service.endpoints"
        )
    return str(given[term.name])


async def _describe(session: aiohttp.ClientSession, url: str) -> wire.Description:
    async with session.get(url + wire.REWARD_PATH, allow_redirects=False) as response:
        body = await read_answer(response)
    try:
        return wire.Description.model_validate_json(body)
    except ValidationError as error:
        raise ServiceFailed(f"{url} is no reward service of this version") from error


def _form(
    asked: wire.ScoreRequest, files: Sequence[bytes], image_format: wire.ImageFormat
) -> aiohttp.FormData:
    form = aiohttp.FormData(default_to_multipart=True)
    form.add_field("request", asked.json_bytes().decode(), content_type="application/json")
    kind = wire.CONTENT_TYPES[image_format]
    for item, content in zip(asked.items, files, strict=True):
        form.add_field("image", content, filename=f"{item.id}.{image_format}", content_type=kind)
    return form
