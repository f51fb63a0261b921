"""The store to try jobs with: examples/cluster/s3-server.yaml on the cluster, as docs/install.md
tells it."""

import os
import re
import secrets
import shutil
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.cluster import build, images
from tests.cluster.kubectl import JsonObject
from tests.cluster.layout import NODE_1
from tests.cluster.s3 import Keys
from tests.cluster.target import Target
from tests.cluster.waiting import Say, wait_for
from tests.documents.desk import Desk, of_this_environment
from tests.documents.pages import ROOT, commands

pytestmark = pytest.mark.cluster

NAMESPACE = "team-a"  # the page's
BUCKET = "tempflow"
VOLUME = "tempflow-test-s3"
IMAGE = "localhost/tempflow-test/seaweedfs:1"
DOCKERFILE = "FROM scratch\nCOPY weed /bin/weed\nENV PATH=/bin\n"
STRICT = "pod-security.kubernetes.io/enforce=restricted"


@pytest.fixture
def image(cluster: Target, tmp_path: Path, say: Say) -> str:
    """SeaweedFS and nothing else, on the nodes."""
    ours = cluster.our_own("nodes that an image can be brought to")
    context, archive = tmp_path / "context", tmp_path / "seaweedfs.tar"
    context.mkdir()
    (context / "Dockerfile").write_text(DOCKERFILE)
    shutil.copy(build.seaweedfs(say), context / "weed")
    images.build_image(context, IMAGE, archive)
    images.remove_image(IMAGE)
    ours.load_image(archive)
    archive.unlink()
    return IMAGE


@pytest.fixture
def volume(cluster: Target, tmp_path: Path) -> Iterator[str]:
    """What a provisioner would make for the claim: a folder of a node, which is this machine."""
    (tmp_path / "volume").mkdir()
    node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE_1.name]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [node]}]}
    made = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": VOLUME},
        "spec": {
            "capacity": {"storage": "20Gi"},
            "accessModes": ["ReadWriteOnce"],
            "local": {"path": str(tmp_path / "volume")},
            "nodeAffinity": {"required": terms},
            "claimRef": {"name": "s3", "namespace": NAMESPACE},
        },
    }
    cluster.kubectl.apply(made)
    yield VOLUME
    cluster.kubectl.run("delete", "persistentvolume", VOLUME, "--timeout=1m")


@pytest.fixture
def keys() -> Keys:
    return Keys(secrets.token_hex(8), secrets.token_hex(16))


@pytest.fixture
def shell(cluster: Target, tmp_path: Path, image: str, volume: str, keys: Keys) -> Iterator[Desk]:
    """In a folder with the manifest, copied and filled in; the namespace takes no pod but a
    restricted one."""
    assert volume
    manifest = (ROOT / "examples/cluster/s3-server.yaml").read_text()
    own_words = {"IMAGE": image, "ACCESS_KEY": keys.access_key, "SECRET_KEY": keys.secret_key}
    for word, own in own_words.items():
        manifest = re.sub(rf"\b{word}\b", own, manifest)
    (tmp_path / "s3-server.yaml").write_text(manifest)
    environment = of_this_environment() | cluster.kubectl.environment()
    environment["PATH"] = f"{cluster.kubectl.binary.parent}{os.pathsep}{environment['PATH']}"
    environment |= {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}
    cluster.kubectl.run("create", "namespace", NAMESPACE)
    cluster.kubectl.run("label", "namespace", NAMESPACE, STRICT)
    yield Desk(tmp_path, environment)
    # It has nothing left to do, but would take its half minute to end.
    whole = ("--all", "-n", NAMESPACE)
    cluster.kubectl.run("delete", "deployments,replicasets", "--cascade=orphan", *whole)
    cluster.kubectl.run("delete", "pods", "--grace-period=1", *whole)
    cluster.kubectl.run("delete", "namespace", NAMESPACE, "--timeout=2m")


def client(endpoint: str, keys: Keys) -> Any:
    plain = Config(signature_version="s3v4", s3={"addressing_style": "path"}, proxies={})
    return boto3.client(
        *("s3", "us-east-1"),
        endpoint_url=endpoint,
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
        config=plain,
    )


def test_the_store_of_the_page_keeps_objects(
    cluster: Target, shell: Desk, keys: Keys, say: Say
) -> None:
    page = commands(ROOT / "docs/install.md")
    first = page.index(f"kubectl apply --namespace {NAMESPACE} -f s3-server.yaml")
    [secret] = [c for c in page if "create secret generic s3-credentials" in c]
    for command in (secret, *page[first : first + 3]):
        shell.run(command)
    say("the store of the page is there")
    # This machine is a node, so the Service's address works here as in a pod.
    address = cluster.kubectl.get("service", "s3", namespace=NAMESPACE)["spec"]["clusterIP"]
    endpoint = f"http://{address}:8333"
    store = client(endpoint, keys)
    assert [bucket["Name"] for bucket in store.list_buckets()["Buckets"]] == [BUCKET]
    store.put_object(Bucket=BUCKET, Key="runs/key", Body=b"from the page's store")
    assert read_in_a_pod(cluster) == "from the page's store"
    for wrong in (Keys(keys.access_key, "0" * 32), Keys("0" * 16, keys.secret_key)):
        with pytest.raises(ClientError, match=r"SignatureDoesNotMatch|InvalidAccessKeyId"):
            client(endpoint, wrong).get_object(Bucket=BUCKET, Key="runs/key")


def read_in_a_pod(cluster: Target) -> str:
    """The object, by the name under which jobs find the store and with the keys of their Secret."""
    held = cluster.kubectl.get("secret", "s3-credentials", namespace=NAMESPACE)["data"]
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    theirs = client(
        f"http://s3.{NAMESPACE}.svc:8333", Keys(*(b64decode(held[n]).decode() for n in names))
    )
    url = theirs.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "runs/key"})
    cluster.kubectl.apply(pod("reader", cluster.busybox_image, f"timeout 20 wget -q -O - '{url}'"))

    def ended() -> str:
        phase = cluster.kubectl.get("pod", "reader", namespace=NAMESPACE)["status"]["phase"]
        return phase if phase in ("Succeeded", "Failed") else ""

    wait_for("end of the pod that reads", ended, deadline_seconds=60)
    return cluster.kubectl.run("logs", "reader", "-n", NAMESPACE)


def pod(name: str, image: str, script: str) -> JsonObject:
    """One that a namespace with the restricted standard takes."""
    container = {
        "name": "main",
        "image": image,
        "command": ["sh", "-c", script],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"containers": [container], "restartPolicy": "Never"},
    }
