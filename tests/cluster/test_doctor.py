"""The doctor on a real API server: one fault each, and what it says to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tempflow import Client, Manifest
from tempflow.cluster import doctor
from tempflow.cluster.doctor import Finding, examine
from tempflow_api import naming
from tempflow_api.crd import spec_schema
from tempflow_trainer.store import FolderStore
from tests.cluster.apiserver import ApiServer
from tests.cluster.client_objects import RUNNING_POD, add_node, digits, pod_of
from tests.cluster.kubectl import JsonObject
from tests.cluster.kubelet import Kubelet
from tests.cluster.reader_node import IMAGE, NODE, Node, readers, taking_readers
from tests.cluster.waiting import wait_for

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def healthy(api: ApiServer) -> Iterator[ApiServer]:
    """With everything that the doctor looks for; each test breaks one thing."""
    made = [operator(), node(gpus=4), dns(ready=True)]
    for thing in made:
        api.create(thing)
    yield api
    for thing in made:
        delete(api, thing)


def delete(api: ApiServer, thing: JsonObject) -> None:
    namespace = thing["metadata"].get("namespace", "default")
    api.kubectl.run(
        *("delete", thing["kind"], thing["metadata"]["name"], "-n", namespace),
        *("--ignore-not-found", "--cascade=background", "--wait=false", "--force"),
    )


def operator(ready: int = 2, version: str = "") -> JsonObject:
    labels = {
        "app.kubernetes.io/name": "tempflow",
        "app.kubernetes.io/component": "operator",
    }
    pod = {"containers": [{"name": "operator", "image": "localhost/operator"}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": "tempflow",
            "namespace": "default",
            "labels": labels | ({"app.kubernetes.io/version": version} if version else {}),
        },
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
        "status": {"readyReplicas": ready, "replicas": 2},
    }


def node(gpus: int) -> JsonObject:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "gpu-node"},
        "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}},
    }


def dns(*, ready: bool) -> JsonObject:
    endpoint = {"addresses": ["10.0.0.10"], "conditions": {"ready": ready}}
    labels = {"kubernetes.io/service-name": "kube-dns"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "kube-dns-x", "namespace": "kube-system", "labels": labels},
        "addressType": "IPv4",
        "endpoints": [endpoint],
    }


def findings(api: ApiServer, *, user: str = "admin", job: Manifest | None = None) -> dict[str, Any]:
    with Client(kubeconfig=str(api.kubeconfig(user))) as client:
        found = examine(client.connection, job.job if job else None)
        return {finding.check: finding for finding in found}


def faults(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if finding.state == "fault"]


def test_a_sound_cluster(healthy: ApiServer) -> None:
    found = findings(healthy)
    assert faults(found) == []
    sound = ("api server", "resource definition", "rights", "operator", "gpus", "queue", "dns")
    assert {found[name].state for name in sound} == {"ok"}
    # Nothing was asked for that could tell.
    assert found["storage"].state == "unknown"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")


def stored_nowhere(name: str, **fields: object) -> Manifest:
    """Whose store refuses the connection."""
    return digits(name, **{"spec.checkpoint.endpointUrl": "http://127.0.0.1:9", **fields})


@contextmanager
def replaced(api: ApiServer, broken: JsonObject, sound: JsonObject) -> Iterator[None]:
    api.create(broken)
    try:
        yield
    finally:
        api.create(sound)


def test_an_operator_that_is_not_ready(healthy: ApiServer) -> None:
    with replaced(healthy, operator(ready=0), operator()):
        found = findings(healthy)
    assert faults(found) == ["operator"]
    assert found["operator"].found == "default/tempflow: 0 of 2 copies are ready"
    assert "kubectl describe pods -n default" in found["operator"].remedy


def test_no_operator(healthy: ApiServer) -> None:
    delete(healthy, operator())
    try:
        assert faults(findings(healthy)) == ["operator"]
    finally:
        healthy.create(operator())


def test_an_operator_of_another_version(healthy: ApiServer) -> None:
    with replaced(healthy, operator(version="99.0"), operator()):
        found = findings(healthy)["operator"]
    assert (found.state, "version 99.0" in found.found) == ("warning", True)
    assert "bring both to one version" in found.remedy


@pytest.fixture
def submitted(healthy: ApiServer) -> Iterator[None]:
    """A job that no operator has seen, and rights for ``nobody`` to see jobs and no more."""
    admin, role = healthy.kubectl, ("jobs-only", "-n", "default")
    admin.run("create", "role", *role, "--verb=get,list", f"--resource={naming.PLURAL}")
    admin.run("create", "rolebinding", *role, "--role=jobs-only", "--user=nobody")
    with Client(kubeconfig=str(healthy.kubeconfig("admin"))) as client:
        client.submit(digits("unseen"))
        yield
        client.delete("unseen")
    admin.run("delete", "role,rolebinding", *role)


@pytest.mark.usefixtures("submitted")
def test_a_job_that_no_operator_sees(healthy: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_UNSEEN_SECONDS", -1.0)
    found = findings(healthy, user="nobody")["operator"]
    assert found.state == "fault"
    assert found.found.endswith(": seen by no operator for over a minute")
    assert "administrator" in found.remedy


def test_a_cluster_that_is_too_old(healthy: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_KUBERNETES", (9, 1))
    found = findings(healthy)
    assert list(found) == faults(found) == ["api server"]
    assert found["api server"].remedy == "upgrade the cluster to 9.1 or newer"


def test_no_resource_definition(healthy: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "API_VERSION", f"{naming.GROUP}/v9")
    found = findings(healthy)["resource definition"]
    assert (found.state, found.found) == ("fault", f"{naming.GROUP}/v9 is not served")
    assert "helm install" in found.remedy


def test_a_newer_resource_definition(healthy: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    known = spec_schema()
    del known["properties"]["packages"]
    monkeypatch.setattr(doctor, "spec_schema", lambda: known)
    found = findings(healthy)["resource definition"]
    assert (found.state, "it also knows spec.packages" in found.found) == ("warning", True)
    assert "upgrade this tempflow" in found.remedy


def test_no_gpus(healthy: ApiServer) -> None:
    with replaced(healthy, node(gpus=0), node(gpus=4)):
        found = findings(healthy)["gpus"]
    assert (found.state, "device plugin" in found.remedy) == ("warning", True)


def test_a_job_that_wants_more_gpus_than_a_node_has(healthy: ApiServer) -> None:
    needs = {"spec.compute.device": "cuda", "spec.compute.processesPerNode": 8}
    wide = stored_nowhere("wide", **needs)
    found = findings(healthy, job=wide)
    assert "gpus" in faults(found)
    assert found["gpus"].found == "a pod needs 8 nvidia.com/gpu, and no node has more than 4"


def test_no_dns(healthy: ApiServer) -> None:
    with replaced(healthy, dns(ready=False), dns(ready=True)):
        assert faults(findings(healthy)) == ["dns"]


def test_rights(healthy: ApiServer) -> None:
    found = findings(healthy, user="nobody")
    assert faults(found) == ["rights"]
    assert "you may not get tempflowgrpojobs" in found["rights"].found
    assert "create rolebinding" in found["rights"].remedy
    hidden = ("operator", "gpus", "dns", "images")
    assert {found[name].state for name in hidden} == {"unknown"}


def test_a_store_that_is_not_there(healthy: ApiServer) -> None:
    found = findings(healthy, job=stored_nowhere("lost"))
    assert faults(found) == ["storage"]
    assert "spec.compute.secretName" in found["storage"].remedy


def test_an_image_that_cannot_be_pulled(healthy: ApiServer) -> None:
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    pod = pod_of("pull", "some-uid", node="gpu-node", state=waiting, phase="Pending")
    healthy.create(pod)
    try:
        found = findings(healthy)
    finally:
        delete(healthy, pod)
    assert faults(found) == ["images"]
    assert "ImagePullBackOff" in found["images"].found


def test_an_image_that_was_pulled(healthy: ApiServer) -> None:
    pod = pod_of("pulled", "some-uid", node="gpu-node", state=RUNNING_POD, phase="Running")
    healthy.create(pod)
    try:
        assert findings(healthy)["images"].state == "ok"
    finally:
        delete(healthy, pod)


def test_a_queue_without_kueue(healthy: ApiServer) -> None:
    job = stored_nowhere("queued", **{"spec.runPolicy.queue": "gold"})
    found = findings(healthy, job=job)
    assert found["queue"].state == "fault"
    assert "Kueue is not installed" in found["queue"].found


@pytest.fixture
def kueue(healthy: ApiServer) -> Iterator[None]:
    """Its kind of queue, and one in another namespace."""
    names = {"plural": "localqueues", "singular": "localqueue", "kind": "LocalQueue"}
    schema = {"openAPIV3Schema": {"type": "object"}}
    version = {"name": "v1beta1", "served": True, "storage": True, "schema": schema}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{names['plural']}.kueue.x-k8s.io",
            "annotations": {"api-approved.kubernetes.io": "unapproved, of a test"},
        },
        "spec": {
            "group": "kueue.x-k8s.io",
            "scope": "Namespaced",
            "names": names,
            "versions": [version],
        },
    }
    admin = healthy.kubectl
    admin.apply(definition)
    name = "localqueues.kueue.x-k8s.io"
    admin.wait_established(name)
    wait_for(
        "queues that are served",
        lambda: findings(healthy)["queue"].state == "warning",
        deadline_seconds=30,
    )
    yield
    admin.run("delete", "customresourcedefinition", name)


@pytest.mark.usefixtures("kueue")
def test_a_queue_that_is_not_there(healthy: ApiServer) -> None:
    job = stored_nowhere("queued", **{"spec.runPolicy.queue": "gold"})
    assert "has no LocalQueue" in findings(healthy)["queue"].found
    silver = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue"}
    healthy.create({**silver, "metadata": {"name": "silver", "namespace": "default"}})
    found = findings(healthy, job=job)["queue"]
    assert found.state == "fault"
    assert found.found == "the job names the queue gold; namespace default has silver"
    assert findings(healthy)["queue"].state == "ok"


def claim(name: str, *modes: str, storage_class: str = "", phase: str = "Bound") -> JsonObject:
    spec = {"accessModes": list(modes), "resources": {"requests": {"storage": "1Gi"}}}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {**spec, "storageClassName": storage_class},
        "status": {"phase": phase},
    }


def secret(name: str, *keys: str) -> JsonObject:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": "default"},
        "stringData": dict.fromkeys(keys, "very-secret"),
    }


TEMPLATE = "spec.compute.podTemplate"
CACHE = "spec.modelCache.persistentVolumeClaim"
MISSING = {
    "spec.compute.secretName": "none",
    "spec.data.promptsConfigMap": "prompts",
    CACHE: "models",
    f"{TEMPLATE}.runtimeClassName": "nvidia",
    f"{TEMPLATE}.priorityClassName": "high",
}
VOLUMES = (
    "[{name: lost, mountPath: /lost, persistentVolumeClaim: lost},"
    " {name: waits, mountPath: /waits, persistentVolumeClaim: waits}]"
)


def test_what_a_manifest_names_and_the_cluster_lacks(healthy: ApiServer) -> None:
    prompts = {"spec.data.prompts": "null", "spec.data.promptsFile": "prompts.txt"}
    found = findings(healthy, job=stored_nowhere("needy", **MISSING, **prompts))["objects"]
    assert found.state == "fault"
    assert sorted(found.found.split("; ")) == sorted(
        [
            "there is no Secret none (spec.compute.secretName)",
            "there is no ConfigMap prompts (spec.data.promptsConfigMap)",
            f"there is no PersistentVolumeClaim models ({CACHE})",
            f"there is no RuntimeClass nvidia ({TEMPLATE}.runtimeClassName)",
            f"there is no PriorityClass high ({TEMPLATE}.priorityClassName)",
        ]
    )
    account = {f"{TEMPLATE}.serviceAccountName": "writer"}
    found = findings(healthy, job=stored_nowhere("needy", **account))["objects"]
    assert found.found == f"there is no ServiceAccount writer ({TEMPLATE}.serviceAccountName)"


def test_what_a_manifest_names_and_is_not_as_it_has_to_be(healthy: ApiServer) -> None:
    there = [
        secret("half", "AWS_ACCESS_KEY_ID"),
        claim("alone", "ReadWriteOnce"),
        claim("lost", "ReadWriteOnce", phase="Lost"),
        claim("waits", "ReadWriteOnce", storage_class="fast", phase="Pending"),
    ]
    fields = {
        "spec.compute.secretName": "half",
        "spec.compute.nodes": 2,
        CACHE: "alone",
        f"{TEMPLATE}.volumes": VOLUMES,
    }
    for one in there:
        healthy.create(one)
    try:
        found = findings(healthy, job=stored_nowhere("needy", **fields))["objects"]
    finally:
        for one in there:
            delete(healthy, one)
    assert found.state == "fault"
    assert found.found.split("; ") == [
        "Secret half (spec.compute.secretName) has no key AWS_SECRET_ACCESS_KEY",
        (
            f"PersistentVolumeClaim alone ({CACHE}) is ReadWriteOnce, and several nodes need "
            "ReadWriteMany"
        ),
        f"PersistentVolumeClaim lost ({TEMPLATE}.volumes) has lost its volume",
        "there is no StorageClass fast (of PersistentVolumeClaim waits)",
    ]
    assert "very-secret" not in str(found)


def test_what_a_manifest_names_and_the_cluster_has(healthy: ApiServer) -> None:
    there = secret("whole", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    job = stored_nowhere("content", **{"spec.compute.secretName": "whole"})
    healthy.create(there)
    try:
        found = findings(healthy, job=job)["objects"]
        hidden = findings(healthy, user="nobody", job=job)["objects"]
    finally:
        delete(healthy, there)
    assert (found.state, found.found) == ("ok", "Secret whole (spec.compute.secretName)")
    assert (hidden.state, "may not look at Secret whole" in hidden.found) == ("unknown", True)


@pytest.fixture
def reader_node(healthy: ApiServer, tmp_path: Path) -> Iterator[Node]:
    kubelet = Kubelet(*healthy.certificate())
    add_node(healthy, kubelet, NODE)
    (tmp_path / "store").mkdir()
    with taking_readers(healthy, kubelet, tmp_path / "store") as node:
        yield node
    kubelet.close()
    healthy.kubectl.run("delete", "node", NODE)


def inside(api: ApiServer, image: str | None = IMAGE, namespace: str | None = None) -> Finding:
    with Client(kubeconfig=str(api.kubeconfig("admin")), namespace=namespace) as client:
        job = stored_nowhere("probed").job
        found = list(examine(client.connection, job, probe=True, image=image))
    return next(one for one in found if one.check == "storage inside")


def test_the_store_as_a_pod_sees_it(healthy: ApiServer, reader_node: Node) -> None:
    found = inside(healthy)
    assert (found.state, found.remedy) == ("ok", "")
    (pod,) = reader_node.seen
    assert "http://127.0.0.1:9" in str(pod["spec"]["containers"][0]["env"])
    assert readers(healthy) == []


def test_a_store_that_refuses_a_pod(healthy: ApiServer, reader_node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reader_node.reader._store = FolderStore(tmp_path / "file/below")
    found = inside(healthy)
    assert (found.state, "inside the cluster: cannot" in found.found) == ("fault", True)
    assert "spec.checkpoint" in found.remedy


def test_no_image_to_probe_with(healthy: ApiServer) -> None:
    found = inside(healthy, image=None, namespace="empty")  # in the other one pods tell of images
    assert (found.state, "--image" in found.remedy) == ("unknown", True)


def test_an_older_definition(healthy: ApiServer) -> None:
    """Last, for it takes a moment until the server tells of another schema."""
    name = f"{naming.PLURAL}.{naming.GROUP}"
    field = (
        "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/data/properties/shuffle"
    )
    path = Path(__file__).parents[2] / "charts/tempflow/files/crd.yaml"
    healthy.kubectl.run(
        *("patch", "crd", name, "--type=json", "-p", f'[{{"op": "remove", "path": "{field}"}}]')
    )
    try:
        wait_for(
            "the older schema",
            lambda: findings(healthy)["resource definition"].state == "fault",
            deadline_seconds=30,
        )
        found = findings(healthy)["resource definition"]
        assert "spec.data.shuffle" in found.found
        assert "crds.enabled" in found.remedy
    finally:
        healthy.kubectl.run("apply", "-f", str(path))
        wait_for(
            "the schema",
            lambda: findings(healthy)["resource definition"].state == "ok",
            deadline_seconds=30,
        )
