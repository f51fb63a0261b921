"""A reward as a service: ``python -m tempflow_trainer.rewards.serve REWARD``.

One process serves one reward, so rewards whose packages do not bear one another, or which want
different devices, live apart, and one that dies takes no other with it. ``wire.py`` says what goes
over the line, docs/rewards-service.md how to run it.
"""

import argparse
import asyncio
import hmac
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from aiohttp import BodyPartReader, web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError

from tempflow_api.errors import (
    AddressInUse,
    DeviceMissing,
    ExitCode,
    ManifestInvalid,
    Problem,
    TempFlowError,
    of_code,
)
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import registry, wire
from tempflow_trainer.rewards.base import Place, Term, is_group_wise
from tempflow_trainer.rewards.batching import Batcher, QueueFull, Sample, ScorerFailed
from tempflow_trainer.rewards.service_metrics import ServiceMetrics

log = logging.getLogger(__name__)

READ_SECONDS = 60.0
"""For the body of a request; a client that sends more slowly holds up others."""
RETRY_AFTER_SECONDS = 1
CHUNK_BYTES = 1 << 16

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Limits:
    """Bounds of what a client may make the service hold in memory: at most
    ``requests * request_bytes + images * pixels * 3`` bytes."""

    images: int = 512
    """Pictures that wait or are being scored; more are refused with 429. Eight full batches of
    64, so that the scorer never idles while clients come back."""
    requests: int = 64
    """Requests whose body is being read or which wait."""
    request_bytes: int = 64 << 20
    """Of one request; a batch of 64 pictures of 512 x 512 is 30 MiB as PNG."""
    pixels: int = 2048 * 2048
    """Of one picture, checked before it is unpacked."""
    linger_seconds: float = 0.005
    """How long a batch that is not full waits for further requests."""
    drain_seconds: float = 60.0
    """How long a request to stop lets accepted requests finish."""


class Refused(Exception):
    """An answer other than scores."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Service:
    """The handlers of one served reward."""

    def __init__(self, term: Term, limits: Limits, token: str | None) -> None:
        self.term, self.limits, self._token = term, limits, token
        self.metrics = ServiceMetrics(term.name)
        self.batcher = Batcher(
            term.scorer, limits.images, limits.linger_seconds, self.metrics.batch_done
        )
        self.metrics.watch_queue(lambda: self.batcher.held)
        self.draining = False
        self.active = 0
        self._batching: asyncio.Task[None] | None = None

    def app(self) -> web.Application:
        """The application; its start starts the batching."""
        app = web.Application(middlewares=[self._outcome], client_max_size=0)
        app.router.add_get(wire.HEALTH_PATH, self._health)
        app.router.add_get(wire.METRICS_PATH, self._metrics)
        app.router.add_get(wire.REWARD_PATH, self._describe)
        app.router.add_post(wire.SCORE_PATH, self._score)
        app.cleanup_ctx.append(self._run_batching)
        return app

    async def _run_batching(self, _app: web.Application) -> AsyncIterator[None]:
        self._batching = asyncio.create_task(self.batcher.run())
        yield
        self._batching.cancel()

    @web.middleware
    async def _outcome(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every refusal as JSON, and every outcome counted."""
        try:
            response = await handler(request)
        except Refused as error:
            response = _failure(error.status, str(error))
        except QueueFull as error:
            response = _failure(429, str(error))
        except ScorerFailed as error:
            response = _failure(500, f"reward {self.term.name}: {error}")
        except web.HTTPException as error:
            response = _failure(error.status, error.reason)
        if request.path == wire.SCORE_PATH:
            self.metrics.request_done(response.status)
        return response

    async def _health(self, _request: web.Request) -> web.Response:
        """200 while requests are taken and scored; what a probe asks."""
        if self._batching is None or self._batching.done():
            return _failure(500, "the batching has ended; see the log")
        if self.draining:
            return _failure(503, "asked to stop")
        return web.json_response({"status": "ok", "reward": self.term.name})

    async def _metrics(self, _request: web.Request) -> web.Response:
        body = generate_latest(self.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _describe(self, request: web.Request) -> web.Response:
        self._authorize(request)
        description = wire.Description(
            reward=self.term.name,
            batch_size=self.term.scorer.batch_size,
            group_wise=is_group_wise(self.term.scorer),
            max_images=self._most_images(),
            max_bytes=self.limits.request_bytes,
        )
        return _json(description)

    async def _score(self, request: web.Request) -> web.Response:
        self._authorize(request)
        self._check_room()
        self.active += 1
        try:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    asked, files = await self._read(request)
            except TimeoutError:
                raise Refused(408, f"the body took more than {READ_SECONDS:.0f} s") from None
            with self.batcher.room(len(files)):
                samples = await asyncio.to_thread(self._samples, asked, files)
                files.clear()
                answers = await self.batcher.score(samples)
        finally:
            self.active -= 1
        scores = [
            wire.ItemScore(id=item.id, error=answer)
            if isinstance(answer, str)
            else wire.ItemScore(id=item.id, score=answer)
            for item, answer in zip(asked.items, answers, strict=True)
        ]
        self.metrics.images_done(scores)
        return _json(wire.ScoreReply(scores=scores))

    def _authorize(self, request: web.Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise Refused(401, "the bearer token is missing or wrong")

    def _check_room(self) -> None:
        """Refuse before a body is read: what cannot be held is not even received."""
        if self.draining:
            raise Refused(503, "asked to stop")
        if self.active >= self.limits.requests:
            raise Refused(429, f"{self.active} requests are being answered, no more at once")
        self.batcher.check_room(1)

    def _most_images(self) -> int:
        if is_group_wise(self.term.scorer):
            return min(self.limits.images, self.term.scorer.batch_size)
        return self.limits.images

    async def _read(self, request: web.Request) -> tuple[wire.ScoreRequest, list[bytes]]:
        """The parts of a request, within the bound of bytes."""
        if not request.content_type == "multipart/form-data":
            raise Refused(415, f"{request.content_type or 'no type'}, expected multipart/form-data")
        if (request.content_length or 0) > self.limits.request_bytes:
            raise Refused(413, f"more than {self.limits.request_bytes} bytes")
        left = self.limits.request_bytes
        parts: list[bytes] = []
        try:
            reader = await request.multipart()
            while (part := await reader.next()) is not None:
                name = "image" if parts else "request"
                if not isinstance(part, BodyPartReader) or part.name != name:
                    raise Refused(400, f"part {len(parts)} is not called {name!r}")
                parts.append(await _content(part, left))
                left -= len(parts[-1])
                if len(parts) - 1 > self._most_images():
                    raise Refused(413, f"more than {self._most_images()} images")
        except ValueError as error:
            raise Refused(400, f"not multipart/form-data: {error}") from error
        if not parts:
            raise Refused(400, "the body has no parts")
        try:
            asked = wire.ScoreRequest.model_validate_json(parts[0])
        except ValidationError as error:
            found = error.errors()[0]
            where = ".".join(str(part) for part in found["loc"])
            raise Refused(400, f"part 'request': {where}: {found['msg']}") from error
        if len(asked.items) != len(parts) - 1:
            raise Refused(400, f"{len(asked.items)} items, but {len(parts) - 1} images")
        return asked, parts[1:]

    def _samples(self, asked: wire.ScoreRequest, files: Sequence[bytes]) -> list[Sample]:
        samples = []
        for item, content in zip(asked.items, files, strict=True):
            try:
                image = wire.decode_image(content, max_pixels=self.limits.pixels)
            except ValueError as error:
                raise Refused(422, f"item {item.id}: {error}") from error
            samples.append(Sample(image, item.prompt, item.metadata))
        return samples


async def _content(part: BodyPartReader, limit: int) -> bytes:
    content = bytearray()
    while chunk := await part.read_chunk(CHUNK_BYTES):
        content += chunk
        if len(content) > limit:
            raise Refused(413, "the request is too large")
    return bytes(content)


def _json(message: wire.Message) -> web.Response:
    return web.Response(body=message.json_bytes(), content_type="application/json")


def _failure(status: int, message: str) -> web.Response:
    response = _json(wire.Failure(error=message))
    response.set_status(status)
    if status in (429, 503):
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if status in (408, 413, 429, 503):
        # The rest of the body is not read, so the connection has no further use.
        response.force_close()
    return response


async def serve(service: Service, host: str, port: int) -> None:
    """Listen until SIGTERM or SIGINT; then finish what was accepted.

    Raises:
        AddressInUse: the address cannot be listened at.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        service.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            said = os.strerror(error.errno) if error.errno else str(error)
            raise AddressInUse(f"cannot listen at {host}:{port}: {said}") from error
        where = runner.addresses[0]
        log.info("serves %s at http://%s:%d", service.term.name, where[0], where[1])
        await stop.wait()
        service.draining = True
        log.info("asked to stop: %d requests to finish", service.active)
        try:
            async with asyncio.timeout(service.limits.drain_seconds):
                while service.active:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("%d requests did not finish in time", service.active)
    finally:
        await runner.cleanup()


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tempflow_trainer.rewards.serve",
        description="Serve one reward over HTTP; docs/rewards-service.md tells more.",
        epilog="example: serve pickscore --device cuda --port 8090 --token-variable TOKEN",
    )
    default = Limits()
    add = parser.add_argument
    add("reward", help="a built-in reward, an entry point, or module:Class")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="parameter of the reward")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--cache", type=Path, default=Path("models"), help="folder for fetched models")
    add("--host", default="127.0.0.1", help="address; 0.0.0.0 in a pod (default: %(default)s)")
    add("--port", type=int, default=8090, help="0 takes a free one (default: %(default)s)")
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--token-variable", help="environment variable with a bearer token to ask")
    token.add_argument("--token-file", type=Path, help="file with a bearer token to ask")
    add("--queue-images", type=int, default=default.images, help="default: %(default)s")
    add("--max-requests", type=int, default=default.requests, help="default: %(default)s")
    add("--max-request-bytes", type=int, default=default.request_bytes, help="default: %(default)s")
    add("--max-pixels", type=int, default=default.pixels, help="a picture; default: %(default)s")
    add("--linger", type=float, default=default.linger_seconds, help="seconds that a batch waits")
    add("--drain", type=float, default=default.drain_seconds, help="seconds to finish at a stop")
    return parser.parse_args(argv)


def _token(arguments: argparse.Namespace) -> str | None:
    if arguments.token_variable:
        token = os.environ.get(arguments.token_variable, "")
        where = f"the environment variable {arguments.token_variable}"
    elif arguments.token_file:
        where = str(arguments.token_file)
        try:
            token = arguments.token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise _invalid("--token-file", f"cannot be read: {error.strerror}") from error
    else:
        return None
    if not token:
        raise _invalid("the token", f"{where} is empty: set it, or serve without a token")
    return str(token)


def _term(arguments: argparse.Namespace) -> RewardTerm:
    parameters = {}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise _invalid("--set", f"got {text!r}, expected KEY=VALUE")
        parameters[key] = value
    try:
        return RewardTerm.model_validate(
            {"name": "served", "uses": arguments.reward, "parameters": parameters}
        )
    except ValidationError as error:
        raise _invalid("reward", error.errors()[0]["msg"]) from error


def _place(arguments: argparse.Namespace) -> Place:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing("--device: cuda asked for, no GPU found; set it to cpu")
    return Place(torch.device(arguments.device), arguments.cache)


def _invalid(path: str, message: str) -> ManifestInvalid:
    return ManifestInvalid("the command line", [Problem(path, message)])


def run(argv: Sequence[str]) -> None:
    """Build the reward, then serve it.

    Raises:
        TempFlowError: it cannot be served.
    """
    arguments = _arguments(argv)
    limits = Limits(
        images=arguments.queue_images,
        requests=arguments.max_requests,
        request_bytes=arguments.max_request_bytes,
        pixels=arguments.max_pixels,
        linger_seconds=arguments.linger,
        drain_seconds=arguments.drain,
    )
    for name, value in vars(limits).items():
        if value < 0 or (value == 0 and isinstance(value, int)):
            raise _invalid(name.replace("_", "-"), f"got {value}, expected more than 0")
    token = _token(arguments)
    try:
        [term] = registry.build([_term(arguments)], _place(arguments)).terms
    except TempFlowError as error:
        raise of_code(error.exit_code, _in_our_words(str(error))) from error
    service = Service(replace(term, name=arguments.reward), limits, token)
    asyncio.run(serve(service, arguments.host, arguments.port))


def _in_our_words(message: str) -> str:
    """The registry speaks of a job's fields; here they are the command line's."""
    message = message.replace("spec.rewards[0].parameters.", "--set ")
    return message.replace("spec.rewards[0].uses", "REWARD").replace("spec.rewards[0]", "REWARD")


def main() -> int:
    """The edge: one line and an exit code for every failure."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        run(sys.argv[1:])
    except TempFlowError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(error.exit_code)
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
