"""helm and the chart's values files, for every test of the chart."""

from pathlib import Path

import pytest

from tests.helm import CHART, Helm, find_helm

CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))


def name_of(values: Path) -> str:
    """`ha` of `ci/ha-values.yaml`."""
    return values.name.removesuffix("-values.yaml")


@pytest.fixture(scope="session")
def helm() -> Helm:
    return find_helm()


@pytest.fixture(scope="session", params=CI_VALUES, ids=name_of)
def ci_values(request: pytest.FixtureRequest) -> Path:
    """Each of the chart's values files in turn."""
    values: Path = request.param
    return values
