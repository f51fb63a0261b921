"""What our pages tell a platform engineer to type, on a control plane without nodes."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tempflow_api import naming
from tempflow_api.conditions import ConditionType
from tests.cluster import bare, build
from tests.cluster.bare import Bare
from tests.cluster.client_objects import condition, digits, status
from tests.cluster.waiting import Say
from tests.documents.pages import ROOT, commands

pytestmark = pytest.mark.cluster

TYPED = ("export ", "helm ", "kubectl ")
# These look at pods that run.
ELSEWHERE = ("helm test", "kubectl rollout status", "kubectl logs")
OF_THE_WHOLE_CLUSTER = "kubectl get crd,clusterroles -l app.kubernetes.io/part-of=tempflow -o name"
DEFINITION = f"{naming.PLURAL}.{naming.GROUP}"


@dataclass
class Desk:
    """A shell with kubectl and helm, in a folder with what the pages speak of."""

    server: Bare
    tools: Path
    folder: Path
    exports: list[str] = field(default_factory=list)

    def type(self, command: str) -> str:
        if command.startswith("export "):
            self.exports.append(command)
        done = subprocess.run(
            ["bash", "-ec", "\n".join([*self.exports, command])],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{self.tools}:{os.environ['PATH']}",
                "KUBECONFIG": str(self.server.kubectl.kubeconfig),
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def desk(binaries: Path, say: Say, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "charts").symlink_to(ROOT / "charts")
    shutil.copy(ROOT / "examples/cluster/s3-server.yaml", folder)
    tools = build.kubectl_and_helm(say)
    with bare.running(
        binaries,
        tools / "kubectl",
        tmp_path_factory.mktemp("bare"),
        controllers="namespace-controller,garbage-collector-controller",
    ) as server:
        yield Desk(server, tools, folder)


def typed(page: str) -> list[str]:
    """Commands of a page, with the one word filled in that no name of an image may be."""
    found = [c for c in commands(ROOT / page) if c.startswith(TYPED)]
    return [
        command.replace("REGISTRY/PROJECT", "registry.example/project")
        for command in found
        if not command.startswith(ELSEWHERE)
    ]


def test_the_page_on_installing_from_top_to_bottom(desk: Desk) -> None:
    """It ends with a cluster as it was before."""
    told = {command: desk.type(command) for command in typed("docs/install.md")}
    assert len(told) > 12
    namespaces = desk.type("kubectl get namespaces -o name").split()
    assert "namespace/tempflow-system" not in namespaces
    assert "namespace/team-a" in namespaces
    assert desk.type(OF_THE_WHOLE_CLUSTER) == ""


def test_the_page_of_the_chart_shows_two_ways(desk: Desk) -> None:
    """The second one beside a definition that somebody else installed."""
    whole, narrow = typed("charts/tempflow/README.md")
    desk.type(whole)
    assert len(desk.type(OF_THE_WHOLE_CLUSTER).split()) > 3
    desk.type("helm uninstall tempflow --namespace tempflow-system")
    desk.server.kubectl.wait_established(DEFINITION)
    desk.type("kubectl get namespace team-a || kubectl create namespace team-a")
    desk.type("kubectl get namespace team-b || kubectl create namespace team-b")
    desk.type(narrow)
    roles = json.loads(desk.type("kubectl get roles --all-namespaces -o json"))["items"]
    ours = {
        role["metadata"]["namespace"] for role in roles if "tempflow" in role["metadata"]["name"]
    }
    assert {"team-a", "team-b"} <= ours


def test_the_page_on_the_operator(desk: Desk) -> None:
    """A job in every state that a command of the page waits for."""
    desk.type("kubectl apply -f charts/tempflow/files/crd.yaml")
    desk.server.kubectl.wait_established(DEFINITION)
    job = digits("demo").job.model_dump_json(by_alias=True, exclude_none=True)
    (desk.folder / "demo.json").write_text(job)
    desk.type("kubectl apply -f demo.json")
    ends = [ConditionType.FAILED, ConditionType.FINISHED, ConditionType.SUSPENDED]
    reached = status("Failed", *(condition(kind, "Told", "by this test") for kind in ends))
    patch = json.dumps({"status": reached})
    desk.type(f"kubectl patch tfgrpo demo --type=merge --subresource=status -p '{patch}'")
    told = {command: desk.type(command) for command in typed("docs/operator.md")}
    assert len(told) >= 7
    assert "by this test" in told.values()
    suspended = "kubectl get tfgrpo demo -o jsonpath='{.spec.runPolicy.suspend}'"
    assert desk.type(suspended) == "false"
