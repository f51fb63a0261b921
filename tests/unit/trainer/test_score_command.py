"""``tempflow rewards``: the process that it starts, and the way there."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from tempflow_api.errors import ExitCode, ManifestInvalid, RewardFailed
from tempflow_trainer import score
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Scores
from tests.unit.trainer.reward_servers import served

HERE = "tests.unit.trainer.test_score_command"


class Width:
    """How wide a picture is. It has a second sentence.

    And more.
    """

    batch_size = 8

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def score(
        self,
        images_N3HW: torch.Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Scores:
        assert list(metadata) == [{"seen": True}] * len(prompts)
        values = torch.full((len(prompts),), self.factor * images_N3HW.shape[3])
        return Scores(values, {i: "hidden" for i, p in enumerate(prompts) if p == "hidden"})


class Together(Width):
    """Compares."""

    group_wise = True

    def score(self, images: torch.Tensor, *_: object) -> torch.Tensor:  # type: ignore[override]
        return torch.arange(len(images)).float()


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    sizes = {"a.png": (14, 14), "b.webp": (40, 20), "c.png": (14, 14)}
    for name, size in sizes.items():
        Image.new("RGBA", size, "white").save(tmp_path / name)
    return [str(tmp_path / name) for name in sizes]


def lines(*words: str) -> list[str]:
    return score.run(score.arguments(list(words)))


def scored(*words: str) -> list[object]:
    (text,) = lines("--output=json", "score", *words)
    return [row["score"] for row in json.loads(text)["scores"]]


FACTS = '--metadata={"seen": true}'


def test_pictures_of_several_sizes_are_scored_as_given(pictures: list[str]) -> None:
    given = [f"--reward={HERE}:Width", "--set=factor=2", FACTS]
    assert scored(*given, "--prompt=any", *pictures) == [28.0, 80.0, 28.0]
    prompts = ["--prompt=x", "--prompt=hidden", "--prompt=y"]
    assert scored(*given, *prompts, *pictures) == [28.0, None, 28.0]
    text = lines("score", *given, *prompts, *pictures)
    assert [line.split()[0] for line in text] == ["28", "none", "28"]
    assert text[1].endswith("b.webp")


def test_a_built_in_reward_sees_the_pixels(pictures: list[str]) -> None:
    full = scored("--reward=digit-ink", "--set=target=0", "--prompt=a one", pictures[0])
    assert full == [pytest.approx(-((28 / 20) ** 2))]


def test_pictures_that_are_compared_are_of_one_size(pictures: list[str]) -> None:
    given = [f"--reward={HERE}:Together", "--prompt=any"]
    assert scored(*given, pictures[0], pictures[2]) == [0.0, 1.0]
    with pytest.raises(ManifestInvalid, match="must be of one size"):
        scored(*given, *pictures)


def test_a_served_reward_is_asked_as_a_run_asks_it(
    pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token from the environment, which no command line shows."""
    monkeypatch.setenv("WIDTH_TOKEN", "open sesame")
    with served(Width(), token="open sesame", name="width") as (url, _):
        given = ["--reward=width", "--prompt=any", FACTS, f"--endpoint={url}"]
        assert scored(*given, "--token-variable=WIDTH_TOKEN", *pictures) == [14.0, 40.0, 14.0]
        with pytest.raises(RewardFailed, match="401"):
            scored(*given, *pictures)
        other = ["--reward=height", *given[1:], "--token-variable=WIDTH_TOKEN"]
        with pytest.raises(RewardFailed, match="serves the reward 'width', expected 'height'"):
            scored(*other, *pictures)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--prompt=a", "--endpoint=http://a:1", "--set=factor=2"],
            "--set: parameters are set where the reward is served",
        ),
        (
            ["--prompt=a", "--endpoint=a:1"],
            "--endpoint: got a:1, expected addresses such as http://",
        ),
        (
            ["--prompt=a", "--endpoint=http://a:1", "--token-variable=a b"],
            "--token-variable: String should match pattern",
        ),
        (["--prompt=a", "--token-variable=A"], "--token-variable: is for a reward that is served"),
        (["--prompt=a", "--prompt=b"], "--prompt: 2 prompts for 3 pictures: one, or each"),
        (["--prompt=a", "--metadata=[1]"], "--metadata: expected a JSON object"),
        (["--prompt=a", "--metadata={"], "--metadata: is not JSON: "),
        (["--prompt=a", "--set=factor"], "--set: 'factor' is not KEY=VALUE"),
        (["--prompt=a", "nowhere.png"], "nowhere.png: cannot be read: No such file"),
        (["--prompt=a", __file__], "is no picture that can be read"),
        (["--prompt=a", "--reward=not a name"], "--reward: String should match pattern"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, pictures: list[str]) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        scored(f"--reward={HERE}:Width", *words, *pictures)
    (line,) = caught.value.lines()
    assert message in line


def test_the_list_has_every_reward_with_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    offers = {"width": f"{HERE}:Width", "gone": "no_such_module:Reward"}
    monkeypatch.setattr(registry, "installed", lambda: offers)
    entries = {entry["name"]: entry for entry in json.loads(lines("--output=json", "list")[0])}
    assert entries.keys() == {*registry.REWARDS, *offers}
    assert entries["width"] == {
        "name": "width",
        "from": f"{HERE}:Width",
        "summary": "How wide a picture is. It has a second sentence.",
        "parameters": {"factor": 1.0},
    }
    assert entries["gone"]["summary"].startswith("broken: reward: no_such_module:Reward cannot be")
    assert all(len(entry["summary"]) > 20 for entry in entries.values())
    assert entries["digit-ink"]["parameters"] == {"target": 0.45, "batch_size": 256}
    assert f"width  ({HERE}:Width)" in lines("list")


def test_an_unknown_reward_lists_those_that_exist(pictures: list[str]) -> None:
    with pytest.raises(RewardFailed, match="no reward 'pikscore'; did you mean 'pickscore'"):
        scored("--reward=pikscore", "--prompt=any", pictures[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward=pikscore"], "error: --reward: no reward 'pikscore'; did you mean 'pickscore'?"),
        (["--reward=digit-ink", "--set=tarket=1"], "error: --set tarket: digit-ink has no such"),
        (
            ["--reward=a", "--endpoint=http://127.0.0.1:9", "--token-variable=NOT_SET_HERE"],
            "error: --token-variable: the environment has no NOT_SET_HERE",
        ),
        (
            ["--reward=a", "--endpoint=http://127.0.0.1:9"],
            "error: --endpoint: the service of reward a is not there: ",
        ),
    ],
)
def test_errors_speak_of_what_was_typed(
    words: list[str],
    message: str,
    pictures: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(score, "SECONDS_AN_ANSWER", 0.3)
    monkeypatch.setattr(sys, "argv", ["score", "score", "--prompt=any", *words, pictures[0]])
    assert score.main() == ExitCode.REWARD
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert "spec." not in told
    assert "service.endpoints" not in told


@pytest.mark.slow
def test_a_mistake_from_the_shell(tmp_path: Path) -> None:
    words = ["rewards", "score", "gone.png", "--reward=ocr", "--prompt=-x"]
    command = [sys.executable, "-m", "tempflow", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: tempflow rewards score: gone.png: cannot be read")
