"""A store that only the cluster reaches, read through a real API server and a reader."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tempflow import Client, Forbidden, NotFound, WaitTimeout, pulling
from tempflow.checkpoints import choose, steps
from tempflow.cli import app
from tempflow.cluster import reader as reading
from tempflow.cluster import reader_pod
from tempflow.cluster.errors import ClusterError
from tempflow_api import naming
from tempflow_api.errors import StoreUnavailable
from tempflow_trainer.reader import store_of
from tests.cluster.apiserver import ApiServer
from tests.cluster.client_objects import (
    RUNNING_POD,
    WHEN,
    add_node,
    add_pod,
    digits,
)
from tests.cluster.kubectl import JsonObject
from tests.cluster.kubelet import Kubelet
from tests.cluster.reader_node import IMAGE, NODE, Node, readers, taking_readers
from tests.cluster.waiting import wait_for
from tests.documents.desk import Desk, of_this_environment
from tests.documents.pages import ROOT, commands
from tests.unit.sdk import stored_runs

pytestmark = pytest.mark.cluster

JOB = "kept"
SECRET = "store-credentials"
ACCOUNT = "may-reach-the-store"


@pytest.fixture(scope="module")
def kubelet(api: ApiServer) -> Iterator[Kubelet]:
    server = Kubelet(*api.certificate())
    add_node(api, server, NODE)
    yield server
    server.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "run"
    for path, content in stored_runs.run().items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


@pytest.fixture
def node(api: ApiServer, kubelet: Kubelet, run: Path) -> Iterator[Node]:
    with taking_readers(api, kubelet, run) as node:
        yield node


@pytest.fixture(scope="module")
def client(api: ApiServer) -> Iterator[Client]:
    with Client(kubeconfig=str(api.kubeconfig("admin"))) as client:
        wants = {
            "spec.compute.secretName": SECRET,
            "spec.compute.podTemplate.serviceAccountName": ACCOUNT,
        }
        client.submit(digits(JOB, **wants))
        yield client
        client.delete(JOB, wait=False)


def test_a_checkpoint_comes_over_a_restart_of_the_api_server(
    client: Client,
    api: ApiServer,
    node: Node,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_pod(api, node.kubelet, JOB, client.get(JOB).uid)
    monkeypatch.setattr(pulling, "RANGE_BYTES", 1000)
    monkeypatch.setattr(pulling, "RANGES_AT_ONCE", 2)
    restarted = threading.Event()

    def advance(done: int, total: int) -> None:
        if done > total / 2 and not restarted.is_set():
            restarted.set()
            api.restart()

    with client.store_inside(JOB) as store:
        assert [step.step for step in steps(store)] == [10, 20, 20]
        pulling.pull(store, choose(store, None), tmp_path / "result", advance)
    assert restarted.is_set()
    for path, content in stored_runs.CONTENT.items():
        assert (tmp_path / "result" / path).read_bytes() == content
    assert readers(api) == []
    (pod,) = node.seen
    (container,) = pod["spec"]["containers"]
    assert container["image"] == IMAGE  # the one of the job's own pod
    assert container["envFrom"] == [{"secretRef": {"name": SECRET}}]
    assert pod["spec"]["serviceAccountName"] == ACCOUNT
    assert pod["metadata"]["ownerReferences"][0]["uid"] == client.get(JOB).uid
    told = {one["name"]: one["value"] for one in container["env"]}[naming.ENV_STORE]
    assert json.loads(told)["uri"] == client.store_of(JOB)[0]


@pytest.mark.usefixtures("client", "node")
def test_the_verbs_that_only_read(api: ApiServer) -> None:
    place = ("--via-cluster", "--image", IMAGE, "--kubeconfig", str(api.kubeconfig("admin")))

    def told(*words: str) -> Any:
        done = CliRunner().invoke(app, ["checkpoints", *words, *place, "-o", "json"])
        assert done.exit_code == 0, done.output
        assert done.stderr.startswith("reads through pod default/tempflow-reader-")
        return json.loads(done.stdout)

    assert [one["step"] for one in told("list", f"job/{JOB}")] == [10, 20, 20]
    assert told("show", f"job/{JOB}", "--step", "10")["manifest"]["files"]
    assert list(told("verify", f"job/{JOB}").values()) == [[], [], []]
    assert readers(api) == []


def test_the_commands_of_the_page(
    client: Client, api: ApiServer, node: Node, tmp_path: Path
) -> None:
    job = client.submit(digits("digits"))
    add_pod(api, node.kubelet, "digits", job.uid)  # says which image
    shell = Desk(tmp_path, of_this_environment() | {"KUBECONFIG": str(api.kubeconfig("admin"))})
    typed = [c for c in commands(ROOT / "docs/checkpoints.md") if c.endswith("--via-cluster")]
    said = {command.split()[1]: shell.run(command) for command in typed}
    assert list(said) == ["pull", "checkpoints"]
    assert said["checkpoints"].count(": sound") == 3
    assert list(tmp_path.rglob("pytorch_lora_weights.safetensors"))
    assert readers(api) == []


def test_it_looks_inside_and_probes(client: Client, node: Node, run: Path) -> None:
    before = sorted(run.rglob("*"))
    with client.store_inside(JOB, image=IMAGE) as store:
        store.files.probe()
        with pytest.raises(FileNotFoundError):
            store.files.info(store.path("nothing"))
    assert sorted(run.rglob("*")) == before
    assert node.seen


def test_ctrl_c_leaves_no_pod(client: Client, api: ApiServer, node: Node) -> None:
    def interrupted() -> None:
        with client.store_inside(JOB, image=IMAGE):
            assert [pod["metadata"]["name"] for pod in readers(api)] == node.names()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert readers(api) == []


def waiting(reason: str, message: str) -> JsonObject:
    return {"waiting": {"reason": reason, "message": message}}


def ended(code: int, message: str) -> JsonObject:
    return {"terminated": {"exitCode": code, "message": message, "finishedAt": WHEN}}


REFUSALS = [
    ("Pending", waiting("ErrImagePull", "not found"), r"cannot be pulled .*--image"),
    ("Pending", waiting("CreateContainerConfigError", "secret not found"), "create what is miss"),
    ("Failed", ended(1, f"No module named '{naming.READER_MODULE}'"), r"older .*--image"),
    ("Failed", ended(137, "killed"), "exit code 137: killed.*give the command again"),
]


@pytest.mark.parametrize(("phase", "state", "said"), REFUSALS)
def test_a_pod_that_does_not_come_up(
    client: Client, api: ApiServer, node: Node, phase: str, state: JsonObject, said: str
) -> None:
    node.phase, node.state = phase, state
    with pytest.raises(ClusterError, match=said), client.store_inside(JOB, image=IMAGE):
        pass
    assert readers(api) == []


def test_a_pod_that_no_node_takes(
    client: Client, api: ApiServer, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.phase = ""
    monkeypatch.setattr(reading, "START_SECONDS", 1.0)
    with (
        pytest.raises(WaitTimeout, match=r"not ready after 1 s: it is not scheduled"),
        client.store_inside(JOB, image=IMAGE),
    ):
        pass
    assert readers(api) == []


def test_a_pod_that_is_deleted_meanwhile(client: Client, api: ApiServer, node: Node) -> None:
    with client.store_inside(JOB, image=IMAGE) as store:
        (name,) = node.names()
        api.kubectl.run("delete", "pod", name, "--force", "--grace-period=0")
        store.files._drop()
        with pytest.raises(ClusterError, match=r"somebody has deleted it.*goes on where"):
            steps(store)


def test_whose_image_nobody_knows(client: Client, node: Node) -> None:
    client.submit(digits("forgotten"))
    with (
        pytest.raises(NotFound, match="its pods are gone: say with --image"),
        client.store_inside("forgotten"),
    ):
        pass
    assert node.seen == []


@pytest.mark.usefixtures("client")
def test_without_the_role(api: ApiServer, node: Node) -> None:
    rules: list[dict[str, Any]] = [
        {
            "apiGroups": ["", naming.GROUP],
            "resources": ["pods", naming.PLURAL],
            "verbs": ["get", "list"],
        },
    ]
    meta = {"name": "looks", "namespace": "default"}
    rbac = "rbac.authorization.k8s.io"
    api.create({"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": meta, "rules": rules})
    api.create(
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "subjects": [{"apiGroup": rbac, "kind": "User", "name": "nobody"}],
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "looks"},
        }
    )
    try:
        with (
            Client(kubeconfig=str(api.kubeconfig("nobody"))) as nobody,
            pytest.raises(Forbidden, match=r"cannot create .*role tempflow-via-cluster"),
            nobody.store_inside(JOB, image=IMAGE),
        ):
            pass
    finally:
        api.kubectl.run("delete", "role,rolebinding", "looks")
    assert node.seen == []


def test_what_the_store_says_is_told(client: Client, node: Node, tmp_path: Path) -> None:
    """Of a store that is not there, as the pod sees it."""
    (tmp_path / "file").write_text("")
    node.reader._store = store_of(json.dumps({"uri": f"file://{tmp_path}/file/under"}))
    with (
        pytest.raises(StoreUnavailable, match="inside the cluster: cannot "),
        client.store_inside(JOB, image=IMAGE) as store,
    ):
        store.files.probe()


def test_an_ended_reader_is_swept_away(client: Client, api: ApiServer, node: Node) -> None:
    """Whose laptop was closed."""
    node.phase, node.state = "Succeeded", ended(0, "nobody has asked for 600 s")
    job = client.get(JOB).raw
    body = reader_pod.manifest(
        client.get(JOB).spec, client.get(JOB).spec.checkpoint, IMAGE, dict(job)
    )
    made = client.connection.send(
        "POST", "/api/v1/namespaces/default/pods", what="a pod", body=body
    )
    left = made["metadata"]["name"]
    wait_for("the end of it", lambda: _phase(api, left) == "Succeeded", deadline_seconds=20)
    node.phase, node.state = "Running", RUNNING_POD
    with client.store_inside(JOB, image=IMAGE):
        assert left not in [pod["metadata"]["name"] for pod in readers(api)]


def _phase(api: ApiServer, name: str) -> str:
    return str(api.kubectl.get("pod", name, namespace="default")["status"]["phase"])
