"""An operator of one namespace, with nothing but the Roles that the chart gives it there."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from tempflow_api import naming
from tests.builders import make_job
from tests.cluster import bare, rbac, scenario
from tests.cluster.bare import Bare
from tests.cluster.forking import OperatorProcess
from tests.cluster.kubectl import Kubectl
from tests.cluster.waiting import wait_for
from tests.helm import find_helm

pytestmark = pytest.mark.cluster

NAMESPACE = "one-team"
KINDS = ("ServiceAccount", "Role", "RoleBinding")


@pytest.fixture
def admin(bare_server: Bare) -> Kubectl:
    """With the namespace, and what the chart puts there and beside the operator."""
    rendered = find_helm().objects(
        *("--set", "image.repository=any", "--set", "image.tag=any"),
        *("--set", f"watch.namespaces={{{NAMESPACE}}}"),
    )
    assert not [one for one in rendered if one["kind"].startswith("ClusterRole")]
    server = bare_server.kubectl
    server.run("create", "namespace", NAMESPACE)
    server.apply(*(one for one in rendered if one["kind"] in KINDS))
    return server


@pytest.fixture
def confined(bare_server: Bare, admin: Kubectl, tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator, as the ServiceAccount that those Roles are bound to."""
    token = admin.run("create", "token", scenario.RELEASE, "-n", scenario.SYSTEM).strip()
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.touch(mode=0o600)
    kubeconfig.write_text(json.dumps(bare.kubeconfig(bare_server.url, token)))
    process = OperatorProcess(
        {
            "KUBECONFIG": str(kubeconfig),
            "POD_NAMESPACE": scenario.SYSTEM,
            "POD_NAME": "confined",
            "TEMPFLOW_LEASE_NAME": scenario.RELEASE,
            "TEMPFLOW_WATCH_NAMESPACES": NAMESPACE,
            "TEMPFLOW_HTTP_PORT": "0",
        },
        tmp_path / "operator.log",
    )
    yield process
    process.end()


@pytest.mark.usefixtures("confined")
def test_roles_of_one_namespace_suffice(bare_server: Bare, admin: Kubectl) -> None:
    began = datetime.now(UTC)
    raw = make_job("confined").build()
    raw["metadata"] = {"name": "confined", "namespace": NAMESPACE}
    raw["spec"]["compute"]["network"] = {"policy": True}
    admin.run("create", "-f", "-", stdin=yaml.safe_dump(raw))

    def phase() -> str:
        found = admin.get(naming.PLURAL, "confined", namespace=NAMESPACE)
        return str(found.get("status", {}).get("phase", ""))

    wait_for(
        "its pods", lambda: bool(admin.items("pods", namespace=NAMESPACE)), deadline_seconds=60
    )
    wait_for("a status", lambda: phase() == "Starting", deadline_seconds=30)
    patch = '{"spec": {"runPolicy": {"suspend": true}}}'
    admin.run("patch", naming.PLURAL, "confined", "-n", NAMESPACE, "--type=merge", "-p", patch)
    wait_for("its suspension", lambda: phase() == "Suspended", deadline_seconds=30)
    admin.run("delete", naming.PLURAL, "confined", "-n", NAMESPACE)

    asked = rbac.requests_of(scenario.OPERATOR_USER, bare_server.audit_log, since=began)
    assert asked.allowed
    assert not asked.forbidden
