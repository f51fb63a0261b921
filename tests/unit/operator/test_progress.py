"""Reading progress from containers that run anybody's code: a real server gives the answers."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from tempflow_operator.decisions.observed import Key
from tempflow_operator.decisions.status import Reading
from tempflow_operator.metrics import Metrics
from tempflow_operator.progress import ProgressReader, Target, Unusable, fetch, parse
from tempflow_operator.settings import Progress as Settings

KEY = Key("team", "demo")
GOOD: dict[str, Any] = {
    "epoch": 3,
    "epochs": 10,
    "phase": "rollout",
    "attempt": 1,
    "runId": "team/demo",
    "reward": 0.5,
    "time": "2026-01-31T12:00:00Z",
}


def answer(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


class TestParse:
    def test_a_good_one(self) -> None:
        progress = parse(answer(checkpointEpoch=2, checkpointUri="s3://b/x"), "team/demo", 1)
        assert (progress.epoch, progress.reward, progress.checkpoint_epoch) == (3, 0.5, 2)

    def test_keys_of_a_newer_trainer_are_ignored(self) -> None:
        assert parse(answer(mood="good"), "team/demo", 1).epoch == 3

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            (b"", "not a progress record"),
            (b"<html>", "not a progress record"),
            (b"\xff\xfe", "not a progress record"),
            (b"null", "not a progress record"),
            (b"[" * 10_000, "not a progress record"),
            (b"{}", "epoch"),
            (answer(epoch=-1), "epoch"),
            (answer(epoch="3"), "epoch"),
            (answer(epoch=10**30), "epoch"),
            (answer(epoch=11), "epoch 11 of 10"),
            (answer(reward=float("nan")), "reward"),
            (answer(etaSeconds=float("inf")), "etaSeconds"),
            (answer(phase="dancing"), "phase"),
            (answer(time="yesterday"), "time"),
            (answer(checkpointUri="x" * 2000), "checkpointUri"),
            (answer(attempt=2), "attempt 2"),
            (answer(runId="team/other"), "another run"),
            (answer(runId=""), "another run"),
        ],
    )
    def test_anything_else_has_a_reason(self, body: bytes, why: str) -> None:
        with pytest.raises(Unusable, match=why) as caught:
            parse(body, "team/demo", 1)
        assert len(str(caught.value)) < 300
        assert "xxxx" not in str(caught.value)  # the answer itself is not repeated


Responder = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def http(body: bytes, *, status: str = "200 OK", headers: str = "") -> Responder:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    return respond


async def silence(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    await asyncio.sleep(10)


async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
        await writer.drain()


async def nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
    await writer.drain()


class Pod:
    """A server on this machine that answers every connection in the given way."""

    def __init__(self, responder: Responder) -> None:
        self.responder = responder
        self.connections = 0

    async def __aenter__(self) -> "Pod":
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self.responder(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def target(self, attempt: int = 1) -> Target:
        return Target("pod-uid", "127.0.0.1", attempt, "team/demo", self.port)


async def fetched(responder: Responder) -> bytes:
    timeout = aiohttp.ClientTimeout(total=0.5)
    async with Pod(responder) as pod, aiohttp.ClientSession(timeout=timeout) as session:
        return await fetch(session, pod.target().url, 16_384)


class TestFetch:
    def test_a_good_answer(self) -> None:
        assert asyncio.run(fetched(http(answer()))) == answer()

    @pytest.mark.parametrize(
        ("responder", "why"),
        [
            (http(b"gone", status="404 Not Found"), "HTTP status 404"),
            (http(b"", status="302 Found", headers="Location: http://10.0.0.1/\r\n"), "302"),
            (http(b" " * 20_000), "longer than 16384 bytes"),
            (flood, "longer than 16384 bytes"),
        ],
    )
    def test_a_bad_answer(self, responder: Responder, why: str) -> None:
        with pytest.raises(Unusable, match=why):
            asyncio.run(fetched(responder))

    @pytest.mark.parametrize("responder", [silence, drip])
    def test_a_slow_answer(self, responder: Responder) -> None:
        with pytest.raises(TimeoutError):
            asyncio.run(fetched(responder))

    def test_something_else_than_http(self) -> None:
        with pytest.raises(aiohttp.ClientError):
            asyncio.run(fetched(nonsense))


def test_an_address_of_either_kind() -> None:
    assert Target("u", "10.0.0.1", 1, "r").url == "http://10.0.0.1:8080/progress"
    assert Target("u", "fd00::1", 1, "r").url == "http://[fd00::1]:8080/progress"


class Reader:
    """A reader at work; ``changes`` are the jobs it has told of."""

    def __init__(self, **settings: Any) -> None:
        defaults = {"interval": 0.05, "timeout": 0.2, "tolerated_failures": 2}
        self.changes: list[Key] = []
        self.metrics = Metrics()
        self.reader = ProgressReader(
            Settings(**{**defaults, **settings}),
            clock=lambda: asyncio.get_running_loop().time(),
            on_change=self.changes.append,
            metrics=self.metrics,
        )

    async def __aenter__(self) -> "Reader":
        self.task = asyncio.create_task(self.reader.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def until(self, target: Target, good: Callable[[Reading], bool]) -> Reading:
        async with asyncio.timeout(5):
            while True:
                reading = self.reader.reading(KEY, target)
                if reading is not None and good(reading):
                    return reading
                await asyncio.sleep(0.01)


class TestReader:
    def test_reads_and_tells_of_changes_only(self) -> None:
        async def story() -> None:
            async with Pod(http(answer())) as pod, Reader() as reader:
                reading = await reader.until(pod.target(), lambda r: r.progress is not None)
                assert reading.progress is not None
                assert reading.progress.epoch == 3
                while pod.connections < 3:
                    await asyncio.sleep(0.01)
                assert reader.changes == [KEY]
                pod.responder = http(answer(epoch=4))
                await reader.until(
                    pod.target(), lambda r: r.progress is not None and r.progress.epoch == 4
                )
                assert reader.changes == [KEY, KEY]

        asyncio.run(story())

    def test_one_failure_is_no_news_many_are(self) -> None:
        async def story() -> None:
            async with Pod(http(answer())) as pod, Reader() as reader:
                await reader.until(pod.target(), lambda r: r.progress is not None)
                pod.responder = http(b"?")
                reading = await reader.until(pod.target(), lambda r: bool(r.problem))
                assert reading.problem.startswith("not a progress record")
                assert reading.progress is not None  # the last that was known
                pod.responder = http(answer())
                await reader.until(pod.target(), lambda r: not r.problem)

        asyncio.run(story())

    @pytest.mark.parametrize(
        ("responder", "problem"), [(silence, "no answer in time"), (nonsense, "no HTTP answer")]
    )
    def test_problems_in_short_words(self, responder: Responder, problem: str) -> None:
        async def story() -> None:
            async with Pod(responder) as pod, Reader(timeout=0.05) as reader:
                reading = await reader.until(pod.target(), lambda r: bool(r.problem))
                assert reading == Reading(None, problem)

        asyncio.run(story())

    def test_nobody_there(self) -> None:
        async def story() -> None:
            async with Pod(silence) as pod:
                target = pod.target()
            async with Reader() as reader:
                reading = await reader.until(target, lambda r: bool(r.problem))
                assert reading.problem == "no connection"

        asyncio.run(story())

    def test_another_attempt_starts_from_nothing(self) -> None:
        async def story() -> None:
            async with Pod(http(answer())) as pod, Reader() as reader:
                await reader.until(pod.target(1), lambda r: r.progress is not None)
                assert reader.reader.reading(KEY, pod.target(2)) is None
                reading = await reader.until(pod.target(2), lambda r: bool(r.problem))
                assert reading == Reading(None, "it is the progress of attempt 1")

        asyncio.run(story())

    def test_a_job_that_is_not_watched_is_left_alone(self) -> None:
        async def story() -> None:
            async with Pod(http(answer())) as pod, Reader() as reader:
                await reader.until(pod.target(), lambda r: r.progress is not None)
                assert reader.reader.reading(KEY, None) is None
                before = pod.connections
                await asyncio.sleep(0.2)
                assert pod.connections <= before + 1

        asyncio.run(story())

    def test_a_slow_pod_delays_no_other(self) -> None:
        async def story() -> None:
            async with (
                Pod(silence) as slow,
                Pod(http(answer())) as good,
                Reader(timeout=3) as reader,
            ):
                reader.reader.reading(Key("team", "slow"), slow.target())
                async with asyncio.timeout(1):
                    await reader.until(good.target(), lambda r: r.progress is not None)

        asyncio.run(story())
