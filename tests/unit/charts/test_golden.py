"""Every ci values file passes helm's own checks, and renders what is recorded in golden/.

After an intended change: TEMPFLOW_UPDATE_GOLDEN=1 pytest tests/unit/charts/test_golden.py
"""

import importlib
import os
from pathlib import Path

import pytest
import yaml

from tests.helm import CHART, Helm, HelmRefused, of_kind
from tests.unit.charts.conftest import name_of

GOLDEN = Path(__file__).parent / "golden"
WITH_PROMETHEUS = ("--api-versions", "monitoring.coreos.com/v1")
OLDEST = "1.31.0"


def _rendered(helm: Helm, values: Path) -> str:
    """The whole output but for the resource definition, which is generated and tested elsewhere."""
    text = helm.template("--values", str(values), *WITH_PROMETHEUS, "--kube-version", OLDEST)
    documents = [part.strip() for part in text.split("\n---\n")]
    own = [part for part in documents if "kind: CustomResourceDefinition" not in _unquoted(part)]
    return "\n---\n".join(own) + "\n"


def _unquoted(text: str) -> str:
    return text.replace('"', "")


def test_lint_is_content(helm: Helm, ci_values: Path) -> None:
    assert "0 chart(s) failed" in helm.lint(ci_values)


def test_renders_what_is_recorded(helm: Helm, ci_values: Path) -> None:
    golden = GOLDEN / f"{name_of(ci_values)}.yaml"
    rendered = _rendered(helm, ci_values)
    if os.environ.get("TEMPFLOW_UPDATE_GOLDEN") == "1":
        golden.write_text(rendered, encoding="utf-8")
    assert rendered == golden.read_text(encoding="utf-8")


def test_nothing_is_recorded_that_no_values_file_renders() -> None:
    recorded = {path.stem for path in GOLDEN.glob("*.yaml")}
    assert recorded == {name_of(path) for path in (CHART / "ci").glob("*.yaml")}


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
def test_objects_fit_kubernetes_own_schemas(helm: Helm, ci_values: Path, version: str) -> None:
    checker = importlib.import_module("kubernetes_validate")
    objects = helm.objects("--values", str(ci_values), "--kube-version", f"{version}.0")
    assert objects
    for item in objects:
        checker.validate(item, version, strict=True)


def test_the_definition_goes_through_unchanged_and_is_kept(helm: Helm) -> None:
    file = yaml.safe_load((CHART / "files" / "crd.yaml").read_text(encoding="utf-8"))
    values = CHART / "ci" / "default-values.yaml"
    (rendered,) = of_kind(helm.objects("--values", str(values)), "CustomResourceDefinition")
    assert rendered["spec"] == file["spec"]
    assert rendered["metadata"]["name"] == file["metadata"]["name"]
    assert rendered["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_definition_can_be_left_out(helm: Helm) -> None:
    values = CHART / "ci" / "default-values.yaml"
    objects = helm.objects("--values", str(values), "--set", "crds.enabled=false")
    assert not of_kind(objects, "CustomResourceDefinition")


def test_older_clusters_are_refused(helm: Helm) -> None:
    values = CHART / "ci" / "default-values.yaml"
    with pytest.raises(HelmRefused, match=r"kubeVersion: >=1\.31"):
        helm.template("--values", str(values), "--kube-version", "1.30.4")
