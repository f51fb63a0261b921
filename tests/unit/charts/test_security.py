"""What the chart lets its pods do, and what it grants to whom."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tempflow_operator.settings import ENVIRONMENT
from tests.helm import CHART, Helm, Manifest, kinds, of_kind

NAMESPACED = str(CHART / "ci" / "namespaced-values.yaml")
DEFAULT = str(CHART / "ci" / "default-values.yaml")
ALL_ON = str(CHART / "ci" / "all-on-values.yaml")
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace"}


def _pods(objects: list[Manifest]) -> list[dict[str, Any]]:
    bare = [item["spec"] for item in of_kind(objects, "Pod")]
    return bare + [item["spec"]["template"]["spec"] for item in of_kind(objects, "Deployment")]


def _granted(roles: list[Manifest]) -> set[tuple[str, str, str]]:
    """Each (group, resource, verb) that the roles grant."""
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _roles(objects: list[Manifest]) -> list[Manifest]:
    return of_kind(objects, "Role") + of_kind(objects, "ClusterRole")


def test_every_pod_meets_the_restricted_profile(helm: Helm, ci_values: Path) -> None:
    pods = _pods(helm.objects("--values", str(ci_values)))
    assert len(pods) == 2  # the operator's, and the one of `helm test`
    for pod in pods:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all("emptyDir" in volume for volume in pod["volumes"])
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


def test_no_role_reaches_secrets_or_everything(helm: Helm, ci_values: Path) -> None:
    granted = _granted(_roles(helm.objects("--values", str(ci_values))))
    assert granted
    for group, resource, verb in granted:
        assert "*" not in (group, resource, verb)
        assert resource not in {"secrets", "pods/exec", "roles", "rolebindings"}


def test_some_namespaces_need_nothing_outside_of_namespaces(helm: Helm) -> None:
    objects = helm.objects("--values", NAMESPACED)
    assert not kinds(objects) & CLUSTER_SCOPED
    operator_roles = [
        role["metadata"]["namespace"]
        for role in of_kind(objects, "Role")
        if role["metadata"]["name"] == "tempflow"
    ]
    assert operator_roles == ["team-a", "team-b"]


def test_both_modes_grant_the_operator_the_same(helm: Helm) -> None:
    whole = of_kind(helm.objects("--values", DEFAULT), "ClusterRole")
    some = of_kind(helm.objects("--values", NAMESPACED), "Role")
    for name in ("tempflow", "tempflow-view", "tempflow-edit", "tempflow-via-cluster"):
        rules = [role["rules"] for role in whole + some if role["metadata"]["name"] == name]
        assert len(rules) == 3
        assert rules[0] == rules[1] == rules[2]


def test_leases_only_in_the_release_namespace_and_by_name(helm: Helm) -> None:
    objects = helm.objects("--values", DEFAULT)
    (role,) = [r for r in _roles(objects) if r["metadata"]["name"] == "tempflow-lease"]
    assert role["metadata"]["namespace"] == "tempflow-system"
    others = [r for r in role["rules"] if r["verbs"] != ["create"]]
    assert [r["resourceNames"] for r in others] == [["tempflow"]]
    assert not [g for g in _granted(of_kind(objects, "ClusterRole")) if g[1] == "leases"]


def test_edit_runs_jobs_and_view_changes_nothing(helm: Helm) -> None:
    roles = {r["metadata"]["name"]: r for r in _roles(helm.objects("--values", DEFAULT))}
    view, edit = _granted([roles["tempflow-view"]]), _granted([roles["tempflow-edit"]])
    assert {verb for _, _, verb in view} == {"get", "list", "watch"}
    assert view < edit
    assert ("tempflow.dev", "tempflowgrpojobs", "create") in edit
    assert ("tempflow.dev", "tempflowgrpojobs/status", "patch") not in edit
    labels = roles["tempflow-edit"]["metadata"]["labels"]
    assert labels["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"


def test_edit_creates_no_pods_and_reading_inside_is_a_role_of_its_own(helm: Helm) -> None:
    roles = {r["metadata"]["name"]: r for r in _roles(helm.objects("--values", DEFAULT))}
    assert not [
        g
        for g in _granted([roles["tempflow-edit"]])
        if "pods" in g[1] and g[2] != "get" and g[2] not in {"list", "watch"}
    ]
    inside = roles["tempflow-via-cluster"]
    assert {resource for _, resource, _ in _granted([inside])} == {"pods", "pods/portforward"}
    assert not [label for label in inside["metadata"]["labels"] if "aggregate" in label]


def test_the_operator_gets_variables_that_it_reads(helm: Helm) -> None:
    (deployment,) = of_kind(helm.objects("--values", NAMESPACED), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert set(variables) <= set(ENVIRONMENT)
    assert variables["TEMPFLOW_WATCH_NAMESPACES"] == "team-a,team-b"
    assert variables["TEMPFLOW_TRAINER_IMAGE"] == "tempflow-trainer:0.1.0"
    assert variables["TEMPFLOW_LEASE_NAME"] == "tempflow"
    (port,) = container["ports"]
    assert variables["TEMPFLOW_HTTP_PORT"] == str(port["containerPort"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]


@pytest.mark.parametrize(("replicas", "budgets"), [("1", 0), ("2", 1)])
def test_a_budget_needs_a_second_replica(helm: Helm, replicas: str, budgets: int) -> None:
    objects = helm.objects("--values", DEFAULT, "--set", f"replicas={replicas}")
    assert len(of_kind(objects, "PodDisruptionBudget")) == budgets


def test_nothing_selects_the_test_pod(helm: Helm) -> None:
    objects = helm.objects("--values", ALL_ON)
    (pod,) = of_kind(objects, "Pod")
    (deployment,) = of_kind(objects, "Deployment")
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert not selector.items() <= pod["metadata"]["labels"].items()


def test_the_test_pod_runs_the_file_as_it_is(helm: Helm) -> None:
    (pod,) = of_kind(helm.objects("--values", DEFAULT), "Pod")
    (script,) = pod["spec"]["containers"][0]["args"]
    source = (CHART / "files" / "helm_test.py").read_text(encoding="utf-8")
    assert script.strip() == source.strip()


def test_no_values_file_makes_a_webhook(helm: Helm, ci_values: Path) -> None:
    """The API server checks jobs by itself: with none there are no certificates to renew."""
    found = kinds(helm.objects("--values", str(ci_values)))
    assert not [kind for kind in found if "Webhook" in kind or kind == "APIService"]


def test_values_files_name_no_registry() -> None:
    for path in (CHART / "ci").glob("*.yaml"):
        image = yaml.safe_load(path.read_text(encoding="utf-8"))["image"]
        assert "/" not in image["repository"]
