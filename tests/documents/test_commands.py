"""What our pages tell people to type works, in the order in which they read it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

from tempflow.presets import preset
from tests.documents.pages import (
    ELSEWHERE,
    NOT_RUN,
    PAGES,
    ROOT,
    TYPED_HERE,
    commands,
    elsewhere,
)


def test_every_command_is_run_somewhere() -> None:
    lost = [
        f"{page.name}: {command}"
        for page in PAGES
        if str(page.relative_to(ROOT)) not in TYPED_HERE
        for command in commands(page)
        if elsewhere(command) is None and not command.startswith(tuple(NOT_RUN))
    ]
    assert lost == []


def test_the_list_has_nothing_that_no_page_shows() -> None:
    shown = [command for page in PAGES for command in commands(page)]
    for start, file in ELSEWHERE.items():
        assert any(command.startswith(start) for command in shown), start
        assert (ROOT / file).exists(), file
    assert all(any(c.startswith(start) for c in shown) for start in NOT_RUN)


def shorten(manifest: Path) -> None:
    """The commands are typed as they are; what they train is made smaller."""
    content = yaml.safe_load(manifest.read_text())
    spec = content["spec"]
    spec["algorithm"] |= {"epochs": 2, "promptsPerEpoch": 4, "seedsPerPrompt": 1}
    spec["evaluation"] |= {"everyEpochs": 50, "steps": 4, "prompts": 2, "imagesPerPrompt": 2}
    spec["compute"] |= {"processesPerNode": 1}
    manifest.write_text(yaml.safe_dump(content))


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """What a reader of any page has: a manifest, and a picture with a word on it."""
    (tmp_path / "job.yaml").write_text(preset("digits").text)
    shorten(tmp_path / "job.yaml")
    sign = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(sign).text((60, 25), "Open", fill="black", font=ImageFont.load_default(64))
    sign.save(tmp_path / "sign.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", TYPED_HERE)
def test_a_page_typed_from_top_to_bottom(page: str, desk: Path) -> None:
    for command in commands(ROOT / page):
        if command.startswith(tuple(NOT_RUN)):
            continue
        if elsewhere(command) is not None and not command.startswith("tempflow init"):
            continue
        if command.startswith("tempflow init --preset") and " -o " in command:
            (desk / "job.yaml").unlink()
        done = subprocess.run(
            [
                "bash",
                "-ec",
                command.replace("tempflow ", f"{shlex.quote(sys.executable)} -m tempflow ", 1),
            ],
            cwd=desk,
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command.startswith("tempflow init --preset"):
            for file in ("job.yaml", "digits.yaml"):
                if (desk / file).exists():
                    shorten(desk / file)
