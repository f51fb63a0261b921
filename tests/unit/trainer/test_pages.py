"""What the pages say of the trainer's records and tests is there."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tempflow_api.record import EpochEvaluations, EpochSeconds, Evaluation, Metrics

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/algorithm.md").read_text()
METRICS, EVALUATIONS = PAGE.partition("## Metrics")[2].split("One line an evaluation")


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        (Metrics, METRICS),
        (EpochSeconds, METRICS),
        (EpochEvaluations, METRICS),
        (Evaluation, EVALUATIONS),
    ],
)
def test_every_metric_is_explained(kind: type[BaseModel], section: str) -> None:
    names = [field.alias or name for name, field in kind.model_fields.items()]
    assert [name for name in names if f"`{name}`" not in section] == []


def test_nothing_is_explained_that_is_not_recorded() -> None:
    for kind, section in ((Metrics, METRICS), (Evaluation, EVALUATIONS)):
        rows = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
        known = {field.alias or name for name, field in kind.model_fields.items()}
        assert set(rows) == known


def test_every_fault_of_the_page_is_held_by_tests_that_exist() -> None:
    page = (ROOT / "docs/checkpoints.md").read_text()
    table = page.partition("| held by |")[2].partition("\n\n")[0].splitlines()[2:]
    folders = ("faults", "unit/trainer", "unit/operator")
    files = [f for folder in folders for f in (ROOT / "tests" / folder).rglob("test_*.py")]
    there = set(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in files)))
    assert len(table) > 20
    for row in table:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert named, row
        assert set(named) <= there, row
