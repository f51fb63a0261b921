"""Alerts and dashboard: they ask for metrics that there are, with labels that these have."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tempflow_operator.metrics import Metrics
from tests.helm import CHART, Helm, kinds, of_kind

ALL_ON = ("--values", str(CHART / "ci" / "all-on-values.yaml"))
WITH_PROMETHEUS = ("--api-versions", "monitoring.coreos.com/v1")
ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
# What the scrape and the histogram add, and label_values' own argument.
ADDED_LABELS = {"namespace", "le", "job"}


def labels_by_metric() -> dict[str, set[str]]:
    """Series that the operator exports, and the labels that each has."""
    metrics = Metrics()
    named = {
        metric._name: set(metric._labelnames)
        for metric in vars(metrics).values()
        if hasattr(metric, "_labelnames")
    }
    return {
        family.name + ending: named[family.name]
        for family in metrics.registry.collect()
        for ending in ENDINGS.get(family.type, ("",))
    }


def dashboard(helm: Helm) -> dict[str, Any]:
    objects = helm.objects(*ALL_ON)
    (config,) = [o for o in of_kind(objects, "ConfigMap") if "dashboard" in o["metadata"]["name"]]
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    (text,) = config["data"].values()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def alerts(helm: Helm) -> list[str]:
    (rule,) = of_kind(helm.objects(*ALL_ON, *WITH_PROMETHEUS), "PrometheusRule")
    return [entry["expr"] for group in rule["spec"]["groups"] for entry in group["rules"]]


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Metrics of ours in an expression, each with the labels that the whole expression names."""
    selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    grouped = {
        label.strip()
        for clause in re.findall(r"by \(([^)]*)\)", expression)
        for label in clause.split(",")
    }
    for name in set(re.findall(r"\btempflow_\w+", expression)):
        yield name, (selected | grouped) - ADDED_LABELS


@pytest.mark.parametrize("what", ["alerts", "dashboard"])
def test_expressions_ask_for_what_is_exported(helm: Helm, what: str) -> None:
    expressions = (
        alerts(helm)
        if what == "alerts"
        else [t["expr"] for p in dashboard(helm)["panels"] for t in p["targets"]]
    )
    exported = labels_by_metric()
    found = [one for expression in expressions for one in asked(expression)]
    assert len(expressions) >= 4
    assert found
    for name, labels in found:
        assert name in exported, name
        assert labels <= exported[name], f"{name} has no label {labels - exported[name]}"


def test_panels_lie_side_by_side_and_every_metric_is_shown(helm: Helm) -> None:
    panels = dashboard(helm)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
    text = json.dumps(panels)
    shown = {name for name in labels_by_metric() if name in text}
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown}
    every = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in labels_by_metric()}
    # Counts of watch events are for those who look into the operator itself.
    assert every - families == {"tempflow_watch_events"}


def test_monitors_need_a_cluster_that_knows_them(helm: Helm) -> None:
    assert not kinds(helm.objects(*ALL_ON)) & {"ServiceMonitor", "PrometheusRule"}
    known = helm.objects(*ALL_ON, *WITH_PROMETHEUS)
    assert kinds(known) >= {"ServiceMonitor", "PrometheusRule"}
