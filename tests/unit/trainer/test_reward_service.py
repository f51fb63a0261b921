"""The real service on loopback, asked by the real client and by clients that misbehave."""

import json
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from aiohttp import web
from torch import Tensor

from tempflow_api import naming
from tempflow_api.errors import Preempted, RewardFailed
from tempflow_api.v1alpha1 import JobSpec, RewardTerm, TempFlowGRPOJob
from tempflow_trainer import main
from tempflow_trainer.log_tail import LogTail
from tempflow_trainer.models import families
from tempflow_trainer.rewards import registry, wire
from tempflow_trainer.rewards import remote as remote_module
from tempflow_trainer.rewards.batching import Sample, ScorerFailed, answers_of
from tempflow_trainer.rewards.serve import Limits
from tempflow_trainer.rewards.transport import ServiceFailed, Unavailable
from tests.numerics.toys import ALONE, spec_of
from tests.unit.trainer.reward_servers import (
    Metadata,
    Moody,
    Red,
    reds,
    remote,
    running,
    score,
    served,
)
from tests.unit.trainer.test_reward_wire import bomb

Parts = list[tuple[str, tuple[str, bytes, str]]]


def parts_of(count: int = 1, *, prompts: list[str] | None = None) -> Parts:
    """The parts of a request for pictures of levels 0, 1, ..."""
    texts = prompts or [f"prompt {i}" for i in range(count)]
    asked = wire.request_of(texts, [{}] * len(texts), call="test")
    files = [wire.encode_image(image) for image in reds(*range(len(texts)))]
    request = ("request", ("", asked.json_bytes(), "application/json"))
    return [request, *(("image", ("0.png", content, "image/png")) for content in files)]


def post(url: str, parts: Parts, **headers: str) -> requests.Response:
    return requests.post(url + wire.SCORE_PATH, files=parts, headers=headers, timeout=10)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_a_served_reward_scores_as_it_does_in_process(image_format: str) -> None:
    pictures = torch.randint(0, 256, (11, 3, 14, 14), dtype=torch.uint8)
    asked = (pictures, ["a three"] * 11, [{"n": i} for i in range(11)])
    here = registry.build([RewardTerm(name="digit-log-probability")])
    with served(here.terms[0].scorer, name="digit-log-probability") as (url, _):
        away = remote(
            url, name="digit-log-probability", imageFormat=image_format, imagesPerRequest=3
        )
        assert away.score(*asked).keys() == here.score(*asked).keys()
        [found], [expected] = away.score(*asked).values(), here.score(*asked).values()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_requests_are_scored_together_and_each_gets_its_own_scores() -> None:
    scorer = Red(batch_size=8, seconds=0.1)
    with served(scorer) as (url, _), ThreadPoolExecutor(12) as clients:
        found = list(clients.map(lambda level: score(remote(url), level), range(12)))
    assert found == [[float(level)] for level in range(12)]
    assert sum(scorer.calls) == 12
    assert max(scorer.calls) > 1
    assert len(scorer.calls) < 7


def test_pictures_of_different_sizes_and_large_requests_share_a_queue() -> None:
    scorer = Red(batch_size=2)
    with served(scorer) as (url, _):
        assert score(remote(url), *range(7)) == [float(i) for i in range(7)]
    assert max(scorer.calls) <= 2


def test_a_picture_without_a_score_is_missing_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served(Moody()) as (url, _):
        found = score(remote(url), 1, 2, 3, prompts=["a", "missing", "c"])
    assert found[0] == 1
    assert found[2] == 3
    assert found[1] != found[1]
    assert "no score for 1 images: no face found" in caplog.text


def test_a_request_that_makes_the_scorer_fail_harms_no_other() -> None:
    with served(Moody(seconds=0.1)) as (url, _), ThreadPoolExecutor(5) as clients:
        bad = [clients.submit(post, url, parts_of(prompts=[prompt])) for prompt in ("raise", "nan")]
        good = [clients.submit(post, url, parts_of(3)) for _ in range(3)]
        assert [reply.result().status_code for reply in good] == [200] * 3
        answers = [reply.result() for reply in bad]
    assert [answer.status_code for answer in answers] == [500, 500]
    said = [answer.json()["error"] for answer in answers]
    assert said[0] == "reward red: RuntimeError: a mood"
    assert said[1] == "reward red: gave nan for an image of prompt 'nan'"


def test_pictures_that_are_too_many_bytes_for_one_request_become_several() -> None:
    scorer = Red(batch_size=64)
    file = len(wire.encode_image(reds(0)[0]))
    with served(scorer, Limits(request_bytes=3 * (file + 2 * wire.PART_BYTES))) as (url, _):
        reward = remote(url, imagesPerRequest=16)
        levels = list(range(16))
        assert score(reward, *levels) == [float(level) for level in levels]
    assert len(scorer.calls) >= 4
    assert wire.requests_within([5, 5, 90, 5], 3 * wire.PART_BYTES) == [slice(0, 2), slice(2, 4)]
    assert wire.requests_within([9], 3) == [slice(0, 1)]


def test_groups_that_are_compared_are_never_scored_with_others() -> None:
    scorer = Red(batch_size=4, seconds=0.02, group_wise=True)
    with served(scorer) as (url, _), ThreadPoolExecutor(4) as clients:
        reward = remote(url)
        assert reward.group_wise
        assert reward.terms[0].scorer.batch_size == 4
        found = list(clients.map(lambda n: post(url, parts_of(n)), [2, 3, 4, 2]))
        too_large = post(url, parts_of(5))
    assert [reply.status_code for reply in found] == [200] * 4
    assert sorted(scorer.calls) == [2, 2, 3, 4]
    assert (too_large.status_code, too_large.json()["error"]) == (413, "more than 4 images")


def test_a_full_queue_refuses_and_a_client_that_returns_is_served() -> None:
    scorer = Red(batch_size=2, seconds=0.1)
    with served(scorer, Limits(images=4)) as (url, service), ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda _: post(url, parts_of(2)), range(8)))
        refused = [reply for reply in replies if reply.status_code != 200]
        assert 0 < len(refused) < 8
        assert {reply.status_code for reply in refused} == {429}
        assert {reply.headers["Retry-After"] for reply in refused} == {"1"}
        reward = remote(url, timeoutSeconds=3.0, deadlineSeconds=9.0, imagesPerRequest=2)
        found = list(clients.map(lambda _: score(reward, 5, 6), range(4)))
        assert found == [[5.0, 6.0]] * 4
        assert service.batcher.held == 0


def test_a_load_of_clients_loses_nothing_and_never_overfills_the_queue() -> None:
    """Sixteen clients with 64 pictures at once, at a queue for 24: each asks until it has its own
    scores, four times."""
    held: list[int] = []

    class Watched(Red):
        def score(self, images_N3HW: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
            held.append(service.batcher.held)
            return super().score(images_N3HW, prompts, metadata)

    scorer = Watched(batch_size=8, seconds=0.01)
    with served(scorer, Limits(images=24)) as (url, service), ThreadPoolExecutor(16) as clients:

        def client(number: int) -> list[list[float]]:
            reward = remote(url, timeoutSeconds=10.0, deadlineSeconds=60.0, imagesPerRequest=4)
            return [score(reward, *range(number, number + 4)) for _ in range(4)]

        found = list(clients.map(client, range(16)))
        left = service.batcher.held
    assert found == [[[float(n + i) for i in range(4)]] * 4 for n in range(16)]
    assert sum(scorer.calls) == 16 * 4 * 4  # nothing was scored twice
    assert 8 < max(held) <= 24
    assert left == 0


def test_a_client_that_goes_away_takes_its_pictures_with_it() -> None:
    scorer = Red(batch_size=1, seconds=0.3)
    with served(scorer) as (url, service), ThreadPoolExecutor(4) as clients:
        first = clients.submit(post, url, parts_of(1))
        time.sleep(0.1)
        with pytest.raises(requests.Timeout):
            requests.post(url + wire.SCORE_PATH, files=parts_of(1), timeout=0.1)
        assert first.result().status_code == 200
        assert post(url, parts_of(1)).status_code == 200
        assert (len(scorer.calls), service.batcher.held, service.active) == (2, 0, 0)


def with_request(content: bytes) -> Parts:
    return [("request", ("", content, "application/json")), *parts_of()[1:]]


@pytest.mark.parametrize(
    ("parts", "status", "message"),
    [
        ([("request", ("", b"{}", "application/json"))], 400, "part 'request': items: Field"),
        (with_request(b'{"items": [{"prompt": "a"}]}'), 400, "part 'request': items.0.id"),
        (with_request(b"not json"), 400, "part 'request': : Invalid JSON"),
        (parts_of(2)[:2], 400, "2 items, but 1 images"),
        (parts_of(1)[1:], 400, "part 0 is not called 'request'"),
        (
            [parts_of()[0], ("image", ("a", b"GIF89a", "image/png"))],
            422,
            "item test-0: not a whole",
        ),
        ([parts_of()[0], ("image", ("a", bomb(3_000), "image/png"))], 422, "item test-0: the pict"),
        ([parts_of()[0], ("image", ("a", bytes(60_000), "image/png"))], 413, "more than 50000"),
        (parts_of(17), 413, "more than 16 images"),
    ],
    ids=["empty", "no id", "no json", "short", "order", "gif", "bomb", "bytes", "images"],
)
def test_a_request_that_is_none_is_told_so(parts: Parts, status: int, message: str) -> None:
    with served(Red(), Limits(images=16, request_bytes=50_000)) as (url, service):
        reply = post(url, parts)
        assert (reply.status_code, reply.json()["error"][: len(message)]) == (status, message)
        assert (service.active, service.batcher.held) == (0, 0)
        assert post(url, parts_of()).status_code == 200


def test_a_body_of_another_type_or_of_unsaid_length_is_bounded_too() -> None:
    with served(Red(), Limits(request_bytes=50_000)) as (url, _):
        plain = requests.post(url + wire.SCORE_PATH, data=b"\x80\x04.", timeout=10)
        assert plain.status_code == 415
        body = requests.Request("POST", url, files=parts_of(1)).prepare()
        assert isinstance(body.body, bytes)
        head, tail = body.body[:-40], body.body[-40:]
        endless = requests.post(
            url + wire.SCORE_PATH,
            data=iter([head, *[bytes(10_000)] * 10, tail]),
            headers={"Content-Type": body.headers["Content-Type"]},
            timeout=10,
        )
        assert endless.status_code == 413


@pytest.mark.parametrize(
    ("given", "status"), [(None, 401), ("Bearer no", 401), ("Bearer yes", 200)]
)
def test_a_token_is_asked_for_where_pictures_are_scored(given: str | None, status: int) -> None:
    headers = {"Authorization": given} if given else {}
    with served(Red(), token="yes") as (url, _):
        assert post(url, parts_of(), **headers).status_code == status
        described = requests.get(url + wire.REWARD_PATH, headers=headers, timeout=10)
        assert described.status_code == status
        assert requests.get(url + wire.HEALTH_PATH, timeout=10).status_code == 200


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Red(), token="s3cret") as (url, _):
        with pytest.raises(RewardFailed, match=r"rewards\[0\]\.service\.tokenVariable: the env"):
            remote(url, tokenVariable="REWARD_TOKEN")
        monkeypatch.setenv("REWARD_TOKEN", "s3cret")
        reward = remote(url, tokenVariable="REWARD_TOKEN")
        assert score(reward, 7) == [7.0]
        assert "s3cret" not in repr(reward)
        monkeypatch.setenv("REWARD_TOKEN", "wrong")
        with pytest.raises(RewardFailed, match=r"status 401: .*the bearer token is missing or wr"):
            score(remote(url, tokenVariable="REWARD_TOKEN"), 7)


def test_health_and_metrics_tell_what_goes_on() -> None:
    with served(Moody(), Limits(images=16)) as (url, service):
        post(url, parts_of(prompts=["a", "missing"]))
        post(url, parts_of(prompts=["raise"]))
        post(url, parts_of(17))
        text = requests.get(url + wire.METRICS_PATH, timeout=10).text
        for line in (
            'tempflow_reward_requests_total{code="200",reward="red"} 1.0',
            'tempflow_reward_requests_total{code="500",reward="red"} 1.0',
            'tempflow_reward_requests_total{code="413",reward="red"} 1.0',
            'tempflow_reward_images_total{outcome="scored",reward="red"} 1.0',
            'tempflow_reward_images_total{outcome="failed",reward="red"} 1.0',
            'tempflow_reward_queued_images{reward="red"} 0.0',
            'tempflow_reward_batch_images_count{reward="red"} 1.0',
        ):
            assert line in text
        assert requests.get(url + wire.HEALTH_PATH, timeout=10).json()["reward"] == "red"
        service.draining = True
        assert requests.get(url + wire.HEALTH_PATH, timeout=10).status_code == 503
        assert post(url, parts_of()).headers["Retry-After"] == "1"


def never() -> bool:
    return False


def terms(url: str, name: str = "red") -> list[RewardTerm]:
    service = {"endpoints": [url], "timeoutSeconds": 0.5}
    return [RewardTerm.model_validate({"name": name, "service": service})]


def test_services_are_checked_before_anything_is_loaded() -> None:
    with served(Red()) as (url, _):
        registry.connect(terms(url), never)
        with pytest.raises(RewardFailed, match="serves the reward 'red', expected 'blue'"):
            registry.connect(terms(url, "blue"), never)
    with pytest.raises(RewardFailed) as caught:
        registry.connect(terms(url), never)
    said = str(caught.value)
    assert said.startswith(
        "spec.rewards[0].service: the service of reward red is not there: no ans"
    )
    assert url in said
    assert "start it (python -m tempflow_trainer.rewards.serve)" in said


def until_scored(ask: Callable[[], list[float]]) -> list[float]:
    """The first scores that are there: after failures a client pauses before it asks again."""
    deadline = time.monotonic() + 20
    while np.isnan(found := ask()).any():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_an_optional_service_that_is_not_there_is_masked_until_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    optional = [
        one.model_copy(update={"required": False}) for one in terms(f"http://127.0.0.1:{port}")
    ]
    reward = registry.build(optional, connected=registry.connect(optional, never))
    assert "it is not required: until then its scores are missing" in caplog.text
    began = time.monotonic()
    assert not reward.group_wise  # nobody is asked for it, and nobody can tell
    assert time.monotonic() - began < 0.1
    assert np.isnan(score(reward, 7, 9)).all()
    assert "reward red: no score for 2 images" in caplog.text
    with served(Red(), port=port):
        assert until_scored(lambda: score(reward, 7, 9)) == [7.0, 9.0]
    with served(Red()) as (url, _), pytest.raises(RewardFailed, match="serves the reward 'red'"):
        registry.connect([one.model_copy(update={"required": False}) for one in terms(url, "blue")])


def test_an_optional_service_that_comes_late_and_compares_loses_one_call() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    [term] = terms(f"http://127.0.0.1:{port}")
    reward = registry.build([term.model_copy(update={"required": False})])
    scorer = Red(group_wise=True)
    pictures = reds(1, 2, 3, 4)

    def scored() -> list[float]:
        found = reward.score(pictures, ["p"] * 4, [{}] * 4, groups=[0, 0, 1, 1])["red"]
        return [round(value * 255, 3) for value in found.tolist()]

    with served(scorer, port=port):
        assert until_scored(scored) == [1.0, 2.0, 3.0, 4.0]
    assert scorer.calls == [2, 2]


def job_of(spec: JobSpec) -> TempFlowGRPOJob:
    return TempFlowGRPOJob.model_validate(
        {
            "apiVersion": "tempflow.dev/v1alpha1",
            "kind": "TempFlowGRPOJob",
            "metadata": {"name": "job"},
            "spec": spec.model_dump(by_alias=True, mode="json"),
        }
    )


def test_services_are_asked_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with served(Red()) as (url, _):
        pass
    monkeypatch.setattr(families, "load", lambda *_a, **_n: pytest.fail("the model was loaded"))
    monkeypatch.setenv(naming.ENV_WORK_DIR, str(tmp_path / "run"))
    chat = {"name": "unified-reward", "parameters": {"endpoints": url, "timeout_seconds": "0.3"}}
    service = {"name": "red", "service": {"endpoints": [url], "timeoutSeconds": 0.3}}
    for term, said in ((chat, "the model's server"), (service, "the service of reward red")):
        job = job_of(spec_of({"rewards": [term], "compute.preflight": False}))
        with pytest.raises(RewardFailed, match=f"{said} is not there"):
            main.train(job, ALONE, never, LogTail(0, 0))


def placed(**settings: float) -> list[RewardTerm]:
    """A reward that the operator serves, with short times unless said otherwise."""
    service = {"timeoutSeconds": 0.2, "deadlineSeconds": 0.4, **settings}
    raw = {"name": "term", "uses": "red", "placement": "service", "service": service}
    return [RewardTerm.model_validate(raw)]


def tell_where(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As the operator does."""
    monkeypatch.setenv(naming.ENV_REWARD_ENDPOINTS, json.dumps({"term": url}))


class TestServedByTheOperator:
    def test_scores_come_from_the_address_in_the_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with served(Red()) as (url, _):
            tell_where(monkeypatch, url)
            registry.connect(placed(), never)
            assert score(registry.build(placed(deadlineSeconds=4.0)), 7, 9) == [7.0, 9.0]

    def test_it_is_waited_for_longer_than_one_attempt(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its image is pulled and its model loaded while the ranks already run."""
        asked: list[float] = []

        async def later(_: web.Request) -> web.StreamResponse:
            asked.append(time.monotonic())
            if asked[-1] - asked[0] < 0.5:
                return web.json_response({"error": "not yet"}, status=503)
            found = wire.Description(reward="red", batch_size=8, max_images=8)
            return web.Response(body=found.json_bytes())

        app = web.Application()
        app.router.add_get(wire.REWARD_PATH, later)
        with running(app) as url:
            tell_where(monkeypatch, url)
            registry.connect(placed(deadlineSeconds=9.0), never)
        assert asked[-1] - asked[0] >= 0.5

    def test_one_that_never_comes_says_where_to_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with served(Red()) as (url, _):
            pass
        tell_where(monkeypatch, url)
        with pytest.raises(RewardFailed, match=r"is not there: no answer within 0\.4 s") as caught:
            registry.connect(placed(), never)
        assert "label tempflow.dev/reward" in str(caught.value)

    def test_a_run_that_is_asked_to_stop_waits_no_longer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with served(Red()) as (url, _):
            pass
        tell_where(monkeypatch, url)
        began = time.monotonic()
        with pytest.raises(Preempted):
            registry.connect(placed(deadlineSeconds=60.0), lambda: True)
        assert time.monotonic() - began < 10

    def test_without_an_operator_there_is_nobody_to_ask(self) -> None:
        with pytest.raises(RewardFailed, match=r"rewards\[0\].placement: got service, and nobody"):
            registry.connect(placed(), never)


def test_requests_are_balanced_over_endpoints_and_go_past_a_dead_one() -> None:
    with served(Red(seconds=0.02)) as (dead, _):
        pass
    one, other = Red(seconds=0.02), Red(seconds=0.02)
    with served(one) as (first, _), served(other) as (second, _):
        reward = remote(first, second, dead, imagesPerRequest=1, deadlineSeconds=9.0)
        levels = list(range(24))
        assert score(reward, *levels) == [float(level) for level in levels]
    assert sum(one.calls) + sum(other.calls) == 24
    assert min(sum(one.calls), sum(other.calls)) >= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s, None),
        (lambda s: s[:-1], "gives 2 scores for 3 images"),
        (
            lambda s: [s[1], s[0], s[2]],
            "answers out of order: score 0 has id 'c-1', expected 'c-0'",
        ),
        (lambda s: [{**x, "id": "d" + x["id"][1:]} for x in s], "answers out of order"),
        (lambda s: [{**x, "score": float("nan")} for x in s], "gives a score of NaN"),
        (lambda s: [{**x, "score": "high"} for x in s], "answers with no scores: scores.0.score"),
    ],
    ids=["right", "short", "order", "of another call", "nan", "text"],
)
def test_a_reply_is_believed_only_if_it_answers_the_question(
    change: Callable[[list[dict[str, object]]], object], message: str | None
) -> None:
    asked = wire.request_of(["a"] * 3, [{}] * 3, call="c")
    scores: list[dict[str, object]] = [{"id": item.id, "score": 0.5} for item in asked.items]
    body = json.dumps({"version": 1, "scores": change(scores)}).encode()
    if message is None:
        assert [s.score for s in remote_module.scores_of(body, asked, "http://x")] == [0.5] * 3
        with pytest.raises(Unavailable):
            remote_module.scores_of(body[:-9], asked, "http://x")
        return
    with pytest.raises(ServiceFailed, match=message):
        remote_module.scores_of(body, asked, "http://x")


def test_a_scorer_that_gives_another_number_of_scores_is_an_error() -> None:
    class Short(Red):
        def score(self, images_N3HW, prompts, metadata):  # type: ignore[no-untyped-def]
            return torch.zeros(len(prompts) + 1)

    with pytest.raises(ScorerFailed, match=r"shape \[2\] for 1 images"):
        answers_of(Short(), [Sample(reds(1)[0], "a", {})])
