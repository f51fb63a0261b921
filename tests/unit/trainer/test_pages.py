"""The page about the algorithm explains every number that a run records."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from tempflow_api.record import EpochEvaluations, EpochSeconds, Evaluation, Metrics

PAGE = (Path(__file__).parents[3] / "docs/algorithm.md").read_text()
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
