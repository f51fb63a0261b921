"""Scorers that the project does not know: by entry point, by path, and what is said of broken
ones."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tempflow_trainer
from tempflow_api.errors import RewardFailed
from tempflow_api.storage import Checkpoint
from tempflow_api.v1alpha1 import Package, RewardTerm
from tempflow_trainer import packages
from tempflow_trainer.rewards import registry
from tempflow_trainer.rewards.base import Place, Reward
from tempflow_trainer.store import FolderStore


class Recording:
    """Keeps what it was made with."""

    batch_size = 4

    def __init__(self, share: float = 1.0, exact: bool = False, *, place: Place) -> None:
        self.share, self.exact, self.place = share, exact, place

    def score(self, *_: object) -> None: ...


class Refusing:
    batch_size = 4

    def __init__(self) -> None:
        raise KeyError("token")

    def score(self, *_: object) -> None: ...


HERE = "tests.unit.trainer.test_reward_plugins"


def build(**term: object) -> Reward:
    return registry.build([RewardTerm.model_validate({"name": "mine", **term})])


def test_a_class_by_its_path_is_made_with_its_parameters_and_its_place(tmp_path: Path) -> None:
    term = RewardTerm(
        name="mine", uses=f"{HERE}:Recording", parameters={"share": "0.5", "exact": "true"}
    )
    place = Place(cache=tmp_path)
    reward = registry.build([term], place)
    scorer = reward.terms[0].scorer
    assert isinstance(scorer, Recording)
    assert (scorer.share, scorer.exact, scorer.place) == (0.5, True, place)
    assert reward.terms[0].name == "mine"


@pytest.mark.parametrize(
    ("uses", "parameters", "message"),
    [
        ("no_such_module:Reward", {}, "uses: no_such_module:Reward cannot be imported: ModuleNot"),
        (f"{HERE}:Nothing", {}, f"uses: {HERE}:Nothing cannot be imported: AttributeError"),
        (f"{HERE}:HERE", {}, f"uses: {HERE}:HERE is no scorer: it has no method score"),
        (f"{HERE}:Refusing", {}, f" {HERE}:Refusing cannot be made: KeyError: 'token'"),
        (f"{HERE}:Recording", {"place": "here"}, "parameters.place: "),
        (f"{HERE}:Recording", {"exact": "perhaps"}, "got 'perhaps', expected true or false"),
        ("digit-inc", {}, "uses: no reward 'digit-inc'; did you mean 'digit-ink'?"),
    ],
)
def test_what_cannot_be_had_says_why(uses: str, parameters: dict[str, str], message: str) -> None:
    with pytest.raises(RewardFailed) as caught:
        build(uses=uses, parameters=parameters)
    assert message in str(caught.value)
    assert str(caught.value).startswith("spec.rewards[0]")


def test_one_scorer_may_serve_twice_under_two_names() -> None:
    terms = [
        RewardTerm(name="light", uses="digit-ink", parameters={"target": "0.1"}),
        RewardTerm(name="bold", uses="digit-ink", parameters={"target": "0.5"}),
    ]
    assert [term.name for term in registry.build(terms).terms] == ["light", "bold"]


def test_a_package_with_the_name_of_a_built_in_reward_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "installed", lambda: {"digit-ink": "theirs:Ink"})
    with pytest.raises(RewardFailed, match="is built in, and theirs:Ink of an installed package"):
        build(uses="digit-ink")
    assert registry.build([RewardTerm(name="digit-contrast")])


WHEEL = "dist/my_rewards-1.0-py3-none-any.whl"
PAGE = Path(tempflow_trainer.__file__).parents[2] / "docs/rewards.md"


def test_the_page_has_a_row_for_every_built_in_reward() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", PAGE.read_text(), re.M)
    assert sorted(rows) == sorted(n for n in registry.REWARDS if not n.startswith("digit-"))


@pytest.mark.slow
def test_the_package_of_the_documentation_is_installed_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the page tells it, word by word: an installed package is all that a reward needs."""
    source, target = tmp_path / "my-rewards", tmp_path / "installed"
    source.mkdir()
    page = PAGE.read_text()
    for name, kind in (("pyproject.toml", "toml"), ("my_rewards.py", "python")):
        block = re.search(rf"`{name}`:\n\n```{kind}\n(.+?)```", page, re.S)
        assert block, f"the page shows no {name}"
        (source / name).write_text(block[1])
    assert len((source / "my_rewards.py").read_text().splitlines()) <= 15
    build = [
        "wheel",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        "dist",
    ]
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    for arguments in ([*build, "./my-rewards"], [*install, WHEEL]):
        pip = [sys.executable, "-m", "pip", *arguments]
        subprocess.run(pip, check=True, timeout=60, cwd=tmp_path)
    told = subprocess.run(["sha256sum", WHEEL], check=True, capture_output=True, cwd=tmp_path)
    digest = told.stdout.split()[0].decode()
    # The same file is what a pod takes from the store.
    package = Package(uri="s3://team/wheels/my_rewards-1.0-py3-none-any.whl", sha256=digest)
    monkeypatch.setattr(packages, "open_at", lambda *_: FolderStore(tmp_path / "dist"))
    (unpacked,) = packages.unpack([package], Checkpoint(), tmp_path / "packages")
    assert (unpacked / "my_rewards.py").read_text() == (source / "my_rewards.py").read_text()
    Image.new("RGB", (6, 4), (255, 0, 51)).save(tmp_path / "photo.png")
    paths = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", ""), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths}
    command = ["score", "photo.png", "--reward=warmth", "--prompt=any", "--set=strength=2"]
    done = subprocess.run(
        [sys.executable, "-m", "tempflow", "rewards", *command, "-o", "json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"][0]["score"] == pytest.approx(1.6)
