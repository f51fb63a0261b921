"""What our pages tell people to type works, in the order in which they read it."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

from tempflow.presets import preset
from tests.documents.desk import Desk
from tests.documents.pages import (
    CI,
    ELSEWHERE,
    NEEDS_HARDWARE,
    PAGES,
    PROGRAMS,
    RECIPES,
    ROOT,
    TYPED_HERE,
    WHOLE_PAGES,
    commands,
    elsewhere,
    other_lines,
)


def test_every_command_is_run_somewhere() -> None:
    lost = [
        f"{page.name}: {command}"
        for page in PAGES
        if str(page.relative_to(ROOT)) not in TYPED_HERE
        for command in commands(page)
        if elsewhere(command) is None
    ]
    assert lost == []


def test_only_recipes_show_what_no_test_can_run() -> None:
    """And whatever their page shows besides is typed."""
    assert RECIPES in TYPED_HERE
    for command in NEEDS_HARDWARE:
        assert elsewhere(command) is None, command
        showing = [str(p.relative_to(ROOT)) for p in PAGES if command in commands(p)]
        assert showing == [RECIPES], command


def test_the_list_has_nothing_that_no_page_shows() -> None:
    shown = [command for page in PAGES for command in commands(page)]
    for start, file in ELSEWHERE.items():
        assert any(command.startswith(start) for command in shown), start
        assert (ROOT / file).exists(), file


def test_who_types_whole_pages_names_them() -> None:
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for file in {elsewhere(command) for command in commands(page)} & set(WHOLE_PAGES):
            assert f'"{name}"' in (ROOT / str(file)).read_text(), (name, file)


def test_what_ci_makes_is_what_pages_have_made() -> None:
    made = re.findall(r"^make (.+)$", (ROOT / CI).read_text(), re.M)
    for start in (start for start, file in ELSEWHERE.items() if file == CI):
        assert start.split()[1] in " ".join(made).split(), start


def test_commands_stand_where_they_are_looked_for() -> None:
    """Not in a block of another kind; the examples in a verb's help are for `test_spelling.py`."""
    hidden = [
        f"{page.name}: {line}"
        for page in PAGES
        for line in other_lines(page)
        if line.removeprefix("# ").startswith(("$ ", *PROGRAMS))
    ]
    assert hidden == []


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
    with Desk(desk) as shell:
        for command in commands(ROOT / page):
            if command in NEEDS_HARDWARE:
                continue
            if elsewhere(command) is not None and not command.startswith("tempflow init"):
                continue
            if command.startswith("tempflow init --preset") and " -o " in command:
                (desk / "job.yaml").unlink()
            shell.run(command)
            if command.startswith("tempflow init --preset"):
                for file in ("job.yaml", "digits.yaml"):
                    if (desk / file).exists():
                        shorten(desk / file)
