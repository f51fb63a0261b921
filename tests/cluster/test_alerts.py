"""The chart's alerts, read and run by Prometheus' own promtool.

They stand with the cluster suite because that one may fetch Debian packages.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import foreign
from tests.cluster.build import promtool
from tests.helm import CHART, find_helm, of_kind

pytestmark = pytest.mark.cluster

NAMESPACE = "tempflow-system"


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rule groups as Prometheus reads them."""
    if shutil.which("apt-get") is None or (foreign.kubeconfig() and os.geteuid() != 0):
        pytest.skip("needs promtool, which comes out of a package of Debian's")
    objects = find_helm().objects(
        "--values",
        str(CHART / "ci" / "all-on-values.yaml"),
        "--api-versions",
        "monitoring.coreos.com/v1",
    )
    (rule,) = of_kind(objects, "PrometheusRule")
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    return path


def run(*arguments: str) -> str:
    done = subprocess.run(
        [str(promtool(print)), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_understands_the_rules(rules: Path) -> None:
    assert "4 rules found" in run("check", "rules", str(rules))


def case(alert: str, minute: int, series: dict[str, str], labels: Sequence[str]) -> dict[str, Any]:
    """A course of series, and the alerts that stand at a minute; labels of each, as YAML."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{minute}m",
                "alertname": alert,
                "exp_alerts": [{"exp_labels": yaml.safe_load(text)} for text in labels],
            }
        ],
    }


UP = f'up{{job="tempflow-metrics", namespace="{NAMESPACE}"}}'
LEADER = f'tempflow_leader{{namespace="{NAMESPACE}", pod="%s"}}'
WAIT = f'tempflow_queue_longest_wait_seconds{{namespace="{NAMESPACE}"}}'
ERRORS = f'tempflow_reconcile_errors_total{{namespace="{NAMESPACE}", error="ApiError"}}'
CASES = {
    "one copy answers": ("TempFlowOperatorDown", 30, {UP: "1x40"}, []),
    "none answers": ("TempFlowOperatorDown", 30, {UP: "0x40"}, ["severity: critical"]),
    "a restart of two minutes": ("TempFlowOperatorDown", 12, {UP: "1x5 0 0 1x40"}, []),
    "one of two leads": (
        "TempFlowNoLeader",
        10,
        {LEADER % "a": "0x20", LEADER % "b": "1x20"},
        [],
    ),
    "none leads": (
        "TempFlowNoLeader",
        10,
        {LEADER % "a": "0x20", LEADER % "b": "0x20"},
        ["severity: critical"],
    ),
    "an error now and then": ("TempFlowReconcileErrors", 60, {ERRORS: "0+1x60"}, []),
    "errors all the time": (
        "TempFlowReconcileErrors",
        60,
        {ERRORS: "0+30x60"},
        ["{severity: warning, error: ApiError}"],
    ),
    "a long queue for a moment": ("TempFlowQueueStuck", 8, {WAIT: "0x5 300 300 0x20"}, []),
    "a queue that stands": ("TempFlowQueueStuck", 20, {WAIT: "300x30"}, ["severity: warning"]),
}


def test_alerts_fire_when_they_should_and_only_then(rules: Path) -> None:
    tests = []
    for alert, minute, series, labels in CASES.values():
        one = case(alert, minute, series, labels)
        for expected in one["alert_rule_test"][0]["exp_alerts"]:
            expected["exp_annotations"] = annotations(rules, alert)
        tests.append(one)
    file = rules.with_name("tests.yaml")
    file.write_text(
        yaml.safe_dump(
            {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests},
        )
    )
    run("test", "rules", str(file))


def annotations(rules: Path, alert: str) -> dict[str, str]:
    """As the rule states them, with what the cases above make of their templates."""
    (entry,) = [
        rule
        for group in yaml.safe_load(rules.read_text())["groups"]
        for rule in group["rules"]
        if rule["alert"] == alert
    ]
    filled = {
        "{{ $labels.error }}": "ApiError",
        "{{ $value | humanizeDuration }}": "5m 0s",
    }
    texts: dict[str, str] = dict(entry["annotations"])
    for template, text in filled.items():
        texts = {name: value.replace(template, text) for name, value in texts.items()}
    return texts
