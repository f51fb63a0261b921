"""Rewards whose models live elsewhere: behind a chat interface, or in a package of their own.

Neither the published weights nor the packages are here. The chat server is a real HTTP server that
answers as OpenAI's interface does; the packages are stand-ins with what hpsv3 1.0 and image-reward
1.5 take and give. Their own code runs in tests/packages.
"""

import base64
import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from PIL import Image

from tempflow_api.errors import ModelUnavailable, RewardFailed
from tempflow_api.v1alpha1 import RewardTerm
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Reward, Scores
from tempflow_trainer.rewards.transport import ServiceFailed
from tempflow_trainer.rewards.unified_reward import MODEL, UnifiedReward, mark_of
from tests.unit.trainer.reward_servers import reds, running

Body = dict[str, Any]


def chat(answer: Callable[[Body], str], *, models: tuple[str, ...] = (MODEL,)) -> web.Application:
    """A server with the two calls of the interface that are used."""

    async def list_models(_request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in models]})

    async def complete(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") not in (None, "Bearer key"):
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        body = await request.json()
        message = {"role": "assistant", "content": answer(body)}
        return web.json_response({"choices": [{"index": 0, "message": message}]})

    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", list_models)
    app.router.add_post("/v1/chat/completions", complete)
    return app


def picture_in(body: Body) -> Image.Image:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_each_picture_gets_the_mark_of_its_answer() -> None:
    bodies: list[Body] = []

    def answer(body: Body) -> str:
        bodies.append(body)
        red = picture_in(body).getpixel((5, 5))[0]  # type: ignore[index]
        return f"It is red.\nFinal Score: {1 + red / 100:.2f}"

    with running(chat(answer)) as url:
        reward = UnifiedReward(endpoints=f"{url}/v1/", timeout_seconds=5.0, deadline_seconds=5.0)
        found = reward.score(reds(0, 100, 250), ["a [b] {c}", "d", "e"], [{}] * 3)
    assert not found.failed
    assert found.values_N.tolist() == pytest.approx([0.2, 0.4, 0.7])
    assert {body["temperature"] for body in bodies} == {0}
    assert {body["model"] for body in bodies} == {MODEL}
    assert {picture_in(body).size for body in bodies} == {(512, 512)}
    texts = {body["messages"][0]["content"][1]["text"] for body in bodies}
    assert any(text.endswith("Text Caption: [a [b] {c}]") for text in texts)


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Final Score: 4", 4.0),
        ("words Final Score:3.5\nmore", 3.5),
        ("Final Score: 4.", 4.0),
        ("Final Score: 5.0", 5.0),
        ("Final Score: 5.5", None),
        ("Final Score: 0", None),
        ("Final Score: 45", None),
        ("Final Score: high", None),
        ("4", None),
        ("", None),
    ],
)
def test_a_mark_is_read_from_one_to_five(text: str, mark: float | None) -> None:
    assert mark_of(text) == mark


def test_an_answer_without_a_mark_is_a_missing_score_and_not_zero() -> None:
    answers = iter(["Final Score: 2", "I would rather not say."])
    with running(chat(lambda _body: next(answers))) as url:
        reward = UnifiedReward(endpoints=f"{url}/v1", requests_per_endpoint=1)
        assert reward.batch_size == 1
        first, second = (reward.score(reds(1), ["a"], [{}]) for _ in range(2))
    assert (first.values_N.tolist(), dict(first.failed)) == ([pytest.approx(0.4)], {})
    assert second.values_N.isnan().all()
    assert "no mark after 'Final Score:': 'I would rather not say.'" in second.failed[0]


def test_what_is_wrong_with_the_server_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(chat(lambda _body: "", models=("other", "third"))) as url:
        with pytest.raises(RewardFailed, match=r"has no 'CodeGoat24/.*', it has other, third"):
            UnifiedReward(endpoints=f"{url}/v1").meet()
        monkeypatch.setenv("CHAT_KEY", "not the key")
        reward = UnifiedReward(endpoints=f"{url}/v1", model="other", token_variable="CHAT_KEY")
        with pytest.raises(ServiceFailed, match="refuses with status 401"):
            reward.score(reds(1), ["a"], [{}])
    with pytest.raises(RewardFailed, match="the model's server is not there"):
        UnifiedReward(endpoints=f"{url}/v1", timeout_seconds=0.3).meet()
    for endpoints in ("", "host:8000"):
        with pytest.raises(RewardFailed, match=f"got '{endpoints}', expected addresses"):
            UnifiedReward(endpoints=endpoints)
    with pytest.raises(RewardFailed, match="the environment has no NO_SUCH"):
        UnifiedReward(endpoints="http://x/v1", token_variable="NO_SUCH")


def build(name: str, **parameters: str) -> Reward:
    return registry.build([RewardTerm(name=name, parameters=parameters)])


@pytest.mark.parametrize(
    ("name", "package"), [("hpsv3", "'hpsv3'"), ("image-reward", "'image-reward'")]
)
def test_a_package_that_is_missing_is_named_with_the_way_out(name: str, package: str) -> None:
    with pytest.raises(RewardFailed) as caught:
        build(name)
    said = str(caught.value)
    assert f"spec.rewards[0]: {name}: the package {package} cannot be imported here" in said
    assert "serve the reward there, and name the address in 'service'" in said


def test_hpsv3_is_the_mean_and_gets_pictures_and_prompts_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: Body = {}

    class Inferencer:
        def __init__(
            self, config_path: Any = None, checkpoint_path: Any = None, device: str = "cuda"
        ) -> None:
            made.update(checkpoint=checkpoint_path, device=device)
            if checkpoint_path == "absent.safetensors":
                raise FileNotFoundError(f"No such file: {checkpoint_path}")
            self.model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
            tokenizer = types.SimpleNamespace(get_added_vocab=lambda: {"<|Reward|>": 7})
            self.processor = types.SimpleNamespace(tokenizer=tokenizer)

        def reward(self, prompts: list[str], image_paths: list[Image.Image]) -> torch.Tensor:
            assert self.model.weight.dtype == torch.float32  # on a CPU
            red = [float(picture.getpixel((0, 0))[0]) for picture in image_paths]  # type: ignore[index]
            return torch.tensor([[r + len(p), 99.0] for r, p in zip(red, prompts, strict=True)])

    package = types.ModuleType("hpsv3")
    package.HPSv3RewardInferencer = Inferencer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hpsv3", package)
    scorer = build("hpsv3", checkpoint="mine.safetensors").terms[0].scorer
    assert made == {"checkpoint": "mine.safetensors", "device": "cpu"}
    found = scorer.score(reds(10, 20, 30), ["a", "bcd", "e <|Reward|>"], [{}, {}, {}])
    assert isinstance(found, Scores)
    assert found.values_N.tolist() == [11.0, 23.0, 30.0]
    assert found.failed == {2: "the prompt has <|Reward|>, which is a mark of the model's own"}
    with pytest.raises(ModelUnavailable, match=r"'hpsv3' cannot load Qwen/.* No such file: absent"):
        build("hpsv3", checkpoint="absent.safetensors")
    with pytest.raises(
        RewardFailed, match=r"expected a \.safetensors file: other files are read by"
    ):
        build("hpsv3", checkpoint="mine.pth")


def test_image_reward_scores_picture_by_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[tuple[str, str | None]] = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = torch.nn.Linear(1, 1)
            self.unused = torch.nn.Linear(1, 1)

        # Release 1.5 calls the second one image and refuses what is neither picture nor path.
        def score(self, prompt: str, image: object) -> float:
            if not isinstance(image, Image.Image | str):
                raise TypeError("Please pass PIL.Image or file path str.")
            assert isinstance(image, Image.Image)
            return float(image.getpixel((0, 0))[0]) - len(prompt)  # type: ignore[index]

    def load(name: str, device: str, download_root: str, med_config: str | None = None) -> Model:
        assert device == "cpu"
        assert download_root.endswith("image-reward")
        loaded.append((name, med_config))
        if name == "unknown":
            raise RuntimeError("Model unknown not found; available models = ['ImageReward-v1.0']")
        return Model()

    package = types.ModuleType("ImageReward")
    package.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    [scores] = build("image-reward").score(reds(10, 20), ["a", "bcd"], [{}, {}]).values()
    assert scores.tolist() == [9.0, 17.0]

    # The package would fetch the text encoder's configuration for a file, too.
    mine, config = tmp_path / "mine.pt", tmp_path / "med_config.json"
    mine.touch()
    with pytest.raises(RewardFailed, match=r"beside .*mine\.pt there is no med_config\.json"):
        build("image-reward", model=str(mine))
    config.touch()
    torch.save(Model().mlp.state_dict(prefix="mlp."), mine)
    build("image-reward", model=str(mine))
    assert loaded == [("ImageReward-v1.0", None), (str(mine), str(config))]
    torch.save({"mlp.bias": torch.zeros(1)}, mine)
    with pytest.raises(ModelUnavailable, match=r"mine\.pt lacks 1 weights, as mlp\.weight"):
        build("image-reward", model=str(mine))
    with pytest.raises(ModelUnavailable, match=r"'image-reward' cannot load unknown and bert-base"):
        build("image-reward", model="unknown")
