"""``tempflow explain`` and the trainer that it asks."""

import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from tempflow import cli, explaining
from tempflow.manifest import parse_text
from tempflow.refused import Refused
from tempflow_api.errors import ModelUnavailable
from tempflow_api.explanation import Explanation
from tests.unit.sdk.manifests import VALID, write

JOB = parse_text(VALID, "job.yaml").job


def replying(code: int, stderr: str) -> list[str]:
    program = f"import sys; sys.stdin.read(); sys.stderr.write({stderr!r}); sys.exit({code})"
    return [sys.executable, "-c", program]


def test_the_trainers_error_is_handed_on_with_its_code() -> None:
    with pytest.raises(ModelUnavailable, match=r"^no such model$"):
        explaining.explain(JOB, command=replying(80, "a warning\nerror: no such model\n"))
    with pytest.raises(Refused, match=r"^--rate: got 'x'$"):
        explaining.explain(JOB, command=replying(2, "error: --rate: got 'x'\n"))


def tempflow(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tempflow", *arguments])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    return int(exited.value.code or 0)


def test_either_a_file_or_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = str(write(tmp_path))
    assert tempflow(monkeypatch, "explain") == 2
    assert tempflow(monkeypatch, "explain", file, "--preset", "digits") == 2
    assert "give either a manifest or --preset NAME" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["steps", "width", "height"])
def test_a_what_if_of_nothing_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert tempflow(monkeypatch, "explain", str(write(tmp_path)), f"--{name}", "0") == 2
    assert f"spec.sampling.{name}: got 0" in capfd.readouterr().err


@pytest.mark.slow
def test_what_if_and_both_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real trainer is asked: a what-if changes the job, text and JSON say the same."""
    file = str(write(tmp_path))
    assert (
        tempflow(monkeypatch, "explain", file, "--steps", "4", "--rate", "5/s", "-o", "json") == 0
    )
    told = Explanation.model_validate(json.loads(capfd.readouterr().out))
    assert [step.step for step in told.schedule] == [0, 1, 2, 3]
    assert told.evaluations.total == 8 * (3 + 6 * 6 + 3 + 3)
    assert told.seconds is not None
    assert told.seconds.rollout == pytest.approx(8 * 39 / 5)
    text = "\n".join(explaining.lines(told))
    assert f"weights are noise x {told.weight_normaliser:.4f}" in text
    for weighting, words in (("guard", "weights are 1 / |dt| x"), ("none", "weights are 1 at")):
        assert words in "\n".join(
            explaining.lines(told.model_copy(update={"weighting": weighting}))
        )
    for words in ("4 prompts x 2 start noises x 3 steps x 6 draws", "144", "seconds an epoch"):
        assert words in text


def test_the_page_names_every_key_and_no_other() -> None:
    """The table of ``docs/explain.md`` against the classes: keys, and what is inside of them."""
    page = (Path(__file__).parents[3] / "docs" / "explain.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", page.partition("## The JSON")[2], re.M)
    told = {key: text for names, text in rows for key in re.findall(r"`(\w+)(?:\[\])?`", names)}
    assert sorted(told) == sorted(Explanation.model_fields)
    for key, field in Explanation.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                # Names of fields of a job are in camel case.
                words = {w for w in re.findall(r"`(\w+)`", told[key]) if w == w.lower()}
                assert words == set(kind.model_fields), key
