"""The runbook is complete: every reason, every variable, every class."""

import re
from pathlib import Path

import pytest

from tempflow_api.conditions import Reason
from tempflow_operator.settings import ENVIRONMENT

TEXT = (Path(__file__).parents[3] / "docs/operator.md").read_text()
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_section(reason: Reason) -> None:
    assert len(SECTIONS[reason].split()) >= 2


def test_no_section_is_about_a_reason_that_is_gone() -> None:
    assert set(SECTIONS) == set(Reason)


def test_every_reason_is_one_word_in_camel_case() -> None:
    assert all(re.fullmatch(r"([A-Z][a-z]+)+", reason) for reason in Reason)


def test_every_variable_is_explained() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (.+) \|$", TEXT.split("## Settings")[1], re.MULTILINE)
    assert listed == list(ENVIRONMENT.items())
