"""What the chart says to bad and to missing values, and that its README tells of all of them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tempflow_api.rules import broken_rules
from tempflow_api.v1alpha1 import TempFlowGRPOJob
from tests.helm import CHART, Helm, HelmRefused
from tools import chart_readme

IMAGE = ("--set", "image.repository=r/tempflow-operator", "--set", "image.tag=v1")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("replicas=0", "/replicas"),
        ("replicas=two", "/replicas"),
        ("replica=2", "'replica' not allowed"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("image.digest=sha256:12", "/image/digest"),
        ("image.repository=r/Image:", "/image/repository"),
        ("trainerImage=without-a-tag", "/trainerImage"),
        ("watch.namespaces={Team_A}", "/watch/namespaces/0"),
        ("watch.namespace=team-a", "'namespace' not allowed"),
        ("log.format=xml", "/log/format"),
        ("gangScheduling=some", "/gangScheduling"),
        ("crds.enabled=maybe", "/crds/enabled"),
        ("resources.limits.memory=plenty", "/resources/limits/memory"),
        ("networkPolicy.apiServerPorts={0}", "/networkPolicy/apiServerPorts/0"),
        ("admissionPolicy.maxGpus=-1", "/admissionPolicy/maxGpus"),
        ("admissionPolicy.allowedImages={a b}", "/admissionPolicy/allowedImages/0"),
        ("admissionPolicy.enabled=true", "bounds nothing: set admissionPolicy.maxGpus"),
        ("metrics.serviceMonitor.interval=often", "/metrics/serviceMonitor/interval"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(helm: Helm, setting: str, complaint: str) -> None:
    with pytest.raises(HelmRefused) as refusal:
        helm.template(*IMAGE, "--set", setting)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param((), id="nothing"),
        pytest.param(("--set", "image.repository=r/tempflow-operator"), id="no tag"),
        pytest.param(("--set", "image.tag=v1"), id="no repository"),
    ],
)
def test_without_an_image_it_stops_and_tells_how_to_make_one(
    helm: Helm, given: tuple[str, ...]
) -> None:
    with pytest.raises(HelmRefused) as refusal:
        helm.template(*given, release="mine", namespace="somewhere")
    message = str(refusal.value)
    assert "image.repository and image.tag are required" in message
    assert "make images push-images" in message
    assert "helm upgrade --install mine charts/tempflow" in message
    assert "--namespace somewhere" in message


def test_a_digest_takes_the_place_of_the_tag(helm: Helm) -> None:
    digest = f"sha256:{'a' * 64}"
    text = helm.template(*IMAGE, "--set", f"image.digest={digest}")
    assert f"image: r/tempflow-operator@{digest}" in text
    assert "r/tempflow-operator:v1" not in text


def test_every_default_is_in_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert set(_paths(defaults, schema)) == set(_schema_paths(schema)) - {"global"}


def _paths(values: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The paths of the defaults, as deep as the schema names fields."""
    for key, value in values.items():
        below = schema.get("properties", {}).get(key, {})
        if "properties" in below and key != "resources":
            yield from _paths(value, below, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _schema_paths(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, below in schema["properties"].items():
        if "properties" in below and key != "resources":
            assert below["additionalProperties"] is False, f"{prefix}{key} takes anything"
            yield from _schema_paths(below, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_readme_is_up_to_date() -> None:
    assert chart_readme.main(["--check"]) == 0


def test_a_value_without_a_comment_is_an_error() -> None:
    with pytest.raises(chart_readme.Undocumented, match=r"^a\.c has no comment"):
        chart_readme.documented_values("a:\n  # Fine.\n  b: 1\n  c: 2\n")


def test_a_commented_block_is_one_value() -> None:
    values = chart_readme.documented_values("# All of\n# them.\na:\n  b: 1\n")
    assert values == [chart_readme.Value("a", {"b": 1}, "All of them.")]


def test_the_chart_is_versioned_with_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = (CHART.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{chart["appVersion"]}"\n' in project


def test_the_example_is_a_valid_job() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    (example,) = yaml.safe_load(chart["annotations"]["artifacthub.io/crdsExamples"])
    assert not broken_rules(TempFlowGRPOJob.model_validate(example).spec)
