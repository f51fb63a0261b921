"""helm and the chart's values files, for every test of the chart."""

from pathlib import Path

import pytest

from tests.helm import CHART, Helm, find_helm

HERE = Path(__file__).parent
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them take helm, whose wheel is for one platform."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.helm)


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
