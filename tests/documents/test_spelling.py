"""Commands that pages only mention, and the examples in the help of each verb, are spelt as the
programs take them: a renamed verb, option, target or module is found here."""

import importlib.util
import re
import shlex
import tomllib
from typing import Any

import pytest
import typer

from tempflow.cli import app
from tests.documents.pages import PAGES, ROOT, mentioned, other_lines

TEMPFLOW = typer.main.get_command(app)
HELP = [
    line.strip()
    for line in other_lines(ROOT / "docs/cli.md")
    if re.match(r"    (\w.* )?tempflow ", line)
]
MENTIONED = sorted({text for page in PAGES for text in mentioned(page)})


def verb_of(words: list[str]) -> tuple[Any, list[str]]:
    """The verb that the words begin with, and the rest of them."""
    command: Any = TEMPFLOW
    while words and isinstance(command, typer.core.TyperGroup):
        found = command.get_command(typer.Context(command), words[0])
        if found is None and (words[0].isupper() or words[0].startswith("-")):
            break
        assert found is not None, f"no verb {words[0]}"
        command, words = found, words[1:]
    return command, words


@pytest.mark.parametrize("example", HELP)
def test_an_example_of_the_help_is_taken(example: str) -> None:
    """Every word of it: what is missing or too much is a mistake as well."""
    [ours] = [part for part in re.split(r"[|>]", example) if "tempflow " in part][:1]
    ours = re.sub(r"\$\(.*\)", "digits", ours)
    verb, rest = verb_of(shlex.split(ours)[1:])
    verb.make_context(ours, rest)


def test_the_help_has_examples() -> None:
    assert len(HELP) > 60


@pytest.mark.parametrize("text", [t for t in MENTIONED if t.startswith("tempflow ")])
def test_a_verb_that_is_mentioned_is_there(text: str) -> None:
    verb, rest = verb_of(shlex.split(text)[1:])
    known = {name for option in verb.params for name in option.opts} | {"--help"}
    assert {word for word in rest if word.startswith("-")} <= known


def test_extras_that_are_mentioned_are_there() -> None:
    there = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pip = " ".join(text for text in MENTIONED if text.startswith("pip "))
    mentioned_extras = set(re.findall(r"\.\[(\w+)\]", pip))
    assert {"trainer", "wandb"} <= mentioned_extras <= set(there)


def test_targets_and_modules_that_are_mentioned_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    asked = {w for text in MENTIONED if text.startswith("make ") for w in text.split()[1:]}
    assert {word for word in asked if "=" not in word} <= targets
    modules = {text.split()[2] for text in MENTIONED if text.startswith("python -m ")}
    assert modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
