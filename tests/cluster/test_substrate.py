"""The cluster under the operator's tests is a real one: what the tests rely on, shown once."""

import shutil
import time
from pathlib import Path

import pytest

from tests.cluster import controlplane, images
from tests.cluster.cluster import ensure_up
from tests.cluster.kubectl import JsonObject
from tests.cluster.layout import GPU_RESOURCE, GPUS_PER_NODE, NODE_2
from tests.cluster.nodes import NODE_GRACE_SECONDS
from tests.cluster.s3 import S3, request
from tests.cluster.s3_server import S3Server
from tests.cluster.target import Target
from tests.cluster.waiting import Say, wait_for

pytestmark = pytest.mark.cluster

# What passes restricted Pod Security.
_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}

# Both fetch a page from the other by its name. Pod 0 ends when pod 1 has its page, and pod 1 when
# pod 0 listens on the second port, which it does only with pod 1's page in hand.
# With `timeout`, because wget's own -T crashes in Debian's static busybox.
_MEET = """
mkdir /tmp/page && echo "page of $JOB_COMPLETION_INDEX" > /tmp/page/index.html
httpd -p 29500 -h /tmp/page
peer=meet-$((1 - JOB_COMPLETION_INDEX)).meet.$NAMESPACE.svc.cluster.local
until timeout 2 wget -q -O - http://$peer:29500/; do sleep 0.2; done
if [ $JOB_COMPLETION_INDEX = 0 ]; then nc -l -p 29501 < /dev/null
else until nc -w 2 $peer 29501 < /dev/null; do sleep 0.2; done; fi
"""

_DOCKERFILE = """
FROM scratch
ARG GREETING
COPY busybox /bin/sh
COPY busybox /bin/cat
RUN echo $GREETING > /greeting
"""


def _container(image: str, script: str, limits: dict[str, str] | None = None) -> JsonObject:
    return {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script],
        "securityContext": _RESTRICTED,
        "resources": {"limits": limits or {}},
    }


def _pod(name: str, namespace: str, container: JsonObject, node: str | None = None) -> JsonObject:
    spec: JsonObject = {
        "containers": [container],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
    }
    if node is not None:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def _meeting(image: str, namespace: str) -> tuple[JsonObject, JsonObject]:
    """A headless service and an Indexed Job of two pods that may not share a node."""
    labels = {"app": "meet"}
    container = _container(image, _MEET)
    container["env"] = [{"name": "NAMESPACE", "value": namespace}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "meet", "namespace": namespace},
        "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
    }
    apart = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "meet", "namespace": namespace},
        "spec": {
            "completions": 2,
            "parallelism": 2,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "subdomain": "meet",
                    "restartPolicy": "Never",
                    "containers": [container],
                    "affinity": {
                        "podAntiAffinity": {
                            "requiredDuringSchedulingIgnoredDuringExecution": [apart]
                        }
                    },
                },
            },
        },
    }
    return service, job


def _ended(cluster: Target, namespace: str, pod: str) -> JsonObject:
    """The state in which the pod's container ended, once it has."""

    def terminated() -> JsonObject | None:
        statuses = cluster.kubectl.get("pod", pod, namespace=namespace)["status"]
        state: JsonObject = statuses.get("containerStatuses", [{}])[0].get("state", {})
        return state.get("terminated")

    return wait_for(f"end of pod {pod}", terminated, deadline_seconds=60)


def _scheduled(cluster: Target, namespace: str, pod: str) -> tuple[str, str]:
    """Status and message of the pod's PodScheduled, once the scheduler has looked at it."""

    def decided() -> tuple[str, str] | None:
        status = cluster.kubectl.get("pod", pod, namespace=namespace)["status"]
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled":
                return condition["status"], condition.get("message", "")
        return None

    return wait_for(f"a decision on pod {pod}", decided, deadline_seconds=60)


def test_both_nodes_are_ready_and_offer_their_gpus(cluster: Target) -> None:
    cluster.our_own("the nodes that we start")
    nodes = cluster.kubectl.items("nodes")

    assert [node["metadata"]["name"] for node in nodes] == ["node-1", "node-2"]
    for node in nodes:
        assert cluster.kubectl.condition("node", node["metadata"]["name"], "Ready") == "True"
        assert node["status"]["allocatable"][GPU_RESOURCE] == str(GPUS_PER_NODE)


def test_starting_a_running_cluster_changes_nothing(cluster: Target, say: Say) -> None:
    ours = cluster.our_own("a cluster that we start")
    before = ours.state.ledger.read_bytes()

    _, started = ensure_up(ours.state, say)

    assert not started
    assert ours.state.ledger.read_bytes() == before


def test_job_pods_on_two_nodes_meet_by_name(cluster: Target, namespace: str) -> None:
    if len(cluster.node_names()) < 2:
        pytest.skip("the cluster has one node")
    cluster.kubectl.apply(*_meeting(cluster.busybox_image, namespace))

    cluster.kubectl.wait_condition(
        "job", "meet", "Complete", namespace=namespace, deadline_seconds=120
    )

    pods = cluster.kubectl.items("pods", "-l", "app=meet", namespace=namespace)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    for pod in pods:
        other = 1 - int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])
        heard = cluster.kubectl.run("logs", pod["metadata"]["name"], "-n", namespace)
        assert f"page of {other}" in heard


def test_gpus_are_counted(cluster: Target, namespace: str) -> None:
    offered = cluster.gpus_of_a_node()
    if not offered:
        pytest.skip("no node of the cluster offers GPUs")

    def asking(name: str, gpus: int) -> JsonObject:
        container = _container(cluster.busybox_image, "true", {GPU_RESOURCE: str(gpus)})
        return _pod(name, namespace, container)

    cluster.kubectl.apply(asking("fits", offered), asking("too-many", offered + 1))

    assert _ended(cluster, namespace, "fits")["exitCode"] == 0
    status, why = _scheduled(cluster, namespace, "too-many")
    assert status == "False"
    assert f"Insufficient {GPU_RESOURCE}" in why


def test_pods_on_each_node_reach_the_api_server_by_its_service(
    cluster: Target, namespace: str
) -> None:
    # A connection is enough: busybox has no cipher in common with the API server.
    script = "nc -w 5 kubernetes.default.svc.cluster.local 443 < /dev/null"
    container = _container(cluster.busybox_image, script)
    names = cluster.node_names()
    cluster.kubectl.apply(*(_pod(f"on-{name}", namespace, container, name) for name in names))

    for name in names:
        assert _ended(cluster, namespace, f"on-{name}")["exitCode"] == 0


def test_pods_reach_s3_and_it_checks_signatures(cluster: Target, namespace: str, s3: S3) -> None:
    assert s3.put("substrate", b"from the store")[0] == 200
    url = s3.presigned_url("get_object", "substrate")
    container = _container(cluster.busybox_image, f"timeout 10 wget -q -O - '{url}'")
    cluster.kubectl.apply(_pod("reader", namespace, container))

    assert _ended(cluster, namespace, "reader")["exitCode"] == 0
    assert cluster.kubectl.run("logs", "reader", "-n", namespace) == "from the store"
    forged = url[:-4] + ("0000" if url[-4:] != "0000" else "1111")
    assert request("GET", forged, None)[0] == 403
    assert request("GET", url.partition("?")[0], None)[0] == 403


def test_data_in_s3_outlives_a_crash_of_the_server(s3_server: S3Server) -> None:
    s3 = s3_server.store
    assert s3.put("crash", b"kept")[0] == 200

    s3_server.kill()
    assert s3.get("crash")[0] == 0
    s3_server.start()

    assert s3.get("crash") == (200, b"kept")


def test_memory_limit_ends_in_oom_kill(cluster: Target, namespace: str) -> None:
    container = _container(cluster.busybox_image, "exec tail /dev/zero", {"memory": "32Mi"})
    cluster.kubectl.apply(_pod("hungry", namespace, container))

    ended = _ended(cluster, namespace, "hungry")

    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)


def test_image_from_a_dockerfile_runs_on_both_nodes(
    cluster: Target, namespace: str, tmp_path: Path
) -> None:
    ours = cluster.our_own("nodes into which it may import an image")
    tag = "localhost/tempflow-test/built:1"
    context, archive = tmp_path / "context", tmp_path / "built.tar"
    context.mkdir()
    shutil.copy("/bin/busybox", context / "busybox")
    (context / "Dockerfile").write_text(_DOCKERFILE)

    images.build_image(context, tag, archive, build_arguments={"GREETING": "hello"})
    images.remove_image(tag)
    ours.load_image(archive)

    container = _container(tag, "cat /greeting")
    names = cluster.node_names()
    cluster.kubectl.apply(*(_pod(f"on-{name}", namespace, container, name) for name in names))
    for name in names:
        assert _ended(cluster, namespace, f"on-{name}")["exitCode"] == 0
        assert cluster.kubectl.run("logs", f"on-{name}", "-n", namespace) == "hello\n"


def test_audit_log_says_who_did_what(cluster: Target, namespace: str) -> None:
    audit_log = cluster.our_own("the API server's audit log").state.audit_log

    created = [
        entry["user"]["username"]
        for entry in controlplane.requests_in(audit_log)
        if entry["verb"] == "create"
        and entry.get("objectRef", {}).get("resource") == "namespaces"
        and entry["objectRef"].get("name") == namespace
    ]

    assert created == ["tempflow-admin"]


def test_node_that_dies_is_not_ready_until_it_is_back(cluster: Target, namespace: str) -> None:
    ours = cluster.our_own("a node that it may kill")
    container = _container(cluster.busybox_image, "exec sleep 3600")
    cluster.kubectl.apply(_pod("victim", namespace, container, NODE_2.name))
    cluster.kubectl.wait_condition(
        "pod", "victim", "Ready", namespace=namespace, deadline_seconds=60
    )

    killed = time.monotonic()
    ours.kill_kubelet(NODE_2)
    try:
        ours.kill_containers(NODE_2)
        cluster.kubectl.wait_condition(
            "node", NODE_2.name, "Ready", statuses=("Unknown",), deadline_seconds=60
        )
        noticed_seconds = time.monotonic() - killed
    finally:
        ours.restart_kubelet(NODE_2)

    # Not much later than the grace period, or it is not what decides.
    assert noticed_seconds < NODE_GRACE_SECONDS + 15
    assert cluster.kubectl.condition("node", NODE_2.name, "Ready") == "True"
    assert _ended(cluster, namespace, "victim")["exitCode"] == 137
    node = cluster.kubectl.get("node", NODE_2.name)
    assert node["status"]["allocatable"][GPU_RESOURCE] == str(GPUS_PER_NODE)
