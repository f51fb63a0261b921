"""The first job of docs/install.md, with its commands, at a real API server: the test is operator,
node and store."""

import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tempflow import Client
from tempflow_api import naming
from tests.cluster.apiserver import ApiServer
from tests.cluster.client_objects import SUCCEEDED, WHEN, add_node, pod_of, pod_status
from tests.cluster.kubelet import Kubelet, Log
from tests.cluster.waiting import wait_for
from tests.documents.desk import Desk, of_this_environment
from tests.documents.pages import ROOT, commands
from tests.unit.sdk import stored_runs

pytestmark = pytest.mark.cluster

NAMESPACE = "team-a"  # the page's
BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@pytest.fixture
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def shell(api: ApiServer, s3: str, tmp_path: Path) -> Iterator[Desk]:
    own = {"KUBECONFIG": str(api.kubeconfig("admin")), "AWS_ENDPOINT_URL": s3, **KEYS}
    api.kubectl.run("create", "namespace", NAMESPACE)
    yield Desk(tmp_path, of_this_environment() | own)
    api.kubectl.run("delete", "namespace", NAMESPACE, "--wait=false")


def play_the_cluster(api: ApiServer, kubelet: Kubelet, s3: str) -> None:
    """What an operator and a node do with the job: a pod, its log, and a result in the store."""
    with Client(kubeconfig=str(api.kubeconfig("admin")), namespace=NAMESPACE) as client:

        def submitted() -> bool:
            return "digits" in [job.name for job in client.list()]

        wait_for("the job", submitted, deadline_seconds=60)
        job, (uri, *_) = client.get("digits"), client.store_of("digits")
    pod = pod_of("digits", job.uid)
    pod["metadata"]["namespace"] = NAMESPACE
    name = pod["metadata"]["name"]
    log = kubelet.logs[name] = Log()
    api.create(pod)
    log.write(1, "epoch 1/1")
    bucket = boto3.resource("s3", "us-east-1", endpoint_url=s3).create_bucket(Bucket=BUCKET)
    for path, content in stored_runs.run().items():
        bucket.put_object(Key=f"{uri.removeprefix(f's3://{BUCKET}/')}/{path}", Body=content)
    ended = {"terminated": {"exitCode": 0, "startedAt": WHEN, "finishedAt": WHEN}}
    api.write_status("Pod", name, pod_status("Succeeded", ended), NAMESPACE)
    log.end()
    api.write_status(naming.PLURAL, "digits", SUCCEEDED, NAMESPACE)


def test_the_first_job_of_the_page(
    api: ApiServer, shell: Desk, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    page = commands(ROOT / "docs/install.md")
    exports = [c.replace("=BUCKET", f"={BUCKET}") for c in page if c.startswith("export ")]
    first = page.index("tempflow init --preset digits")
    kubelet = Kubelet(*api.certificate())
    add_node(api, kubelet)
    cluster = threading.Thread(target=play_the_cluster, args=(api, kubelet, s3), daemon=True)
    cluster.start()
    said = [shell.run("\n".join([*exports, command])) for command in page[first : first + 3]]
    cluster.join(timeout=30)
    kubelet.close()
    assert "epoch 1/1" in said[1]
    assert list(shell.folder.rglob("pytorch_lora_weights.safetensors"))
