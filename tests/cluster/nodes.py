"""The two nodes: containerd, kubelet and kube-proxy of each, and the end of their containers."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import yaml

from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl
from tests.cluster.layout import (
    CLUSTER_DOMAIN,
    CLUSTER_RANGE,
    DNS_SERVICE_ADDRESS,
    GPU_RESOURCE,
    GPUS_PER_NODE,
    KUBELET_HEALTH_PORT,
    KUBELET_PORT,
    LOOPBACK,
    NODES,
    POD_BRIDGE,
    PROXY_HEALTH_PORT,
    PROXY_METRICS_PORT,
    Node,
    StateFolder,
)
from tests.cluster.pki import Pki, kubeconfig_of
from tests.cluster.processes import Ledger
from tests.cluster.waiting import wait_for

# A dead node is noticed soon: its lease is renewed every quarter of the first, and the
# controller-manager waits for the second. Not shorter: on two busy cores a live one is late too.
LEASE_SECONDS = 12
NODE_GRACE_SECONDS = 16

# Where Debian's containernetworking-plugins puts them.
CNI_PLUGINS = Path("/usr/lib/cni")
# CNI keeps a record of each pod here, whatever the configuration says.
_CNI_RESULTS = Path("/var/lib/cni/results")
_CONTAINERD_NAMESPACE = "k8s.io"  # the kubelet's, fixed in containerd


def containerd_name(node: Node) -> str:
    return f"containerd-{node.name}"


def kubelet_name(node: Node) -> str:
    return f"kubelet-{node.name}"


def proxy_name(node: Node) -> str:
    return f"kube-proxy-{node.name}"


def start_containerd(ledger: Ledger, node: Node, sandbox_image: str) -> None:
    folder = ledger.state.node(node)
    (folder / "cni").mkdir(parents=True, exist_ok=True)
    (folder / "cni" / "10-bridge.conflist").write_text(json.dumps(_pod_network(ledger.state, node)))
    config = folder / "containerd.toml"
    config.write_text(_containerd_config(ledger.state, node, sandbox_image))
    ledger.start(
        containerd_name(node), ["containerd", "--config", config], namespace=node.namespace
    )


def wait_containerd(ledger: Ledger, node: Node) -> None:
    def answers() -> bool:
        ledger.must_run(containerd_name(node))
        return _ctr(ledger.state, node, "version").returncode == 0

    wait_for(f"an answer of containerd on {node.name}", answers, deadline_seconds=60)


def load_image(state: StateFolder, archive: Path) -> None:
    """Import a docker or OCI archive into both nodes, at the same time: unpacking uses one core."""
    with ThreadPoolExecutor(len(NODES)) as threads:
        list(threads.map(lambda node: import_image(state, node, archive), NODES))


def import_image(state: StateFolder, node: Node, archive: Path) -> None:
    """Import a docker or OCI archive into one node."""
    done = _ctr(state, node, "images", "import", str(archive))
    if done.returncode != 0:
        why = done.stderr.strip()[-300:]
        raise ClusterError(f"import of {archive} into {node.name} failed: {why}")


def holds_image(state: StateFolder, node: Node, image: str, image_id: str) -> bool:
    """Whether the node has the image of that name with that id, the digest of its configuration."""
    # "NAME TYPE DIGEST ...", below a heading.
    listed = _ctr(state, node, "images", "list", f"name=={image}").stdout.splitlines()[1:]
    if not listed:
        return False
    manifest = _ctr(state, node, "content", "get", listed[0].split()[2])
    if manifest.returncode != 0:
        return False
    known: str = json.loads(manifest.stdout)["config"]["digest"]
    return known == f"sha256:{image_id}"


def start_proxy(ledger: Ledger, node: Node, binaries: Path) -> None:
    config = ledger.state.config / f"{proxy_name(node)}.yaml"
    config.write_text(yaml.safe_dump(_proxy_config(ledger.state, node)))
    ledger.start(
        proxy_name(node),
        [binaries / "kube-proxy", f"--config={config}"],
        namespace=node.namespace,
    )


def start_kubelet(ledger: Ledger, node: Node, binaries: Path, pki: Pki) -> None:
    """Start the kubelet of a node; `wait_ready` tells when the node can be used."""
    folder = ledger.state.node(node)
    config = ledger.state.config / f"{kubelet_name(node)}.yaml"
    config.write_text(yaml.safe_dump(_kubelet_config(ledger.state, node, pki)))
    ledger.start(
        kubelet_name(node),
        [
            *(binaries / "kubelet", f"--config={config}", f"--node-ip={node.address}"),
            f"--kubeconfig={kubeconfig_of(ledger.state, kubelet_name(node))}",
            f"--hostname-override={node.name}",
            f"--root-dir={folder / 'kubelet'}",
            f"--cert-dir={folder / 'kubelet' / 'pki'}",
        ],
        namespace=node.namespace,
    )


def wait_ready(ledger: Ledger, kubectl: Kubectl, node: Node, *, since: float) -> None:
    """Wait for a Ready that the kubelet reported after that time; then the node offers its GPUs.

    The condition alone is not enough: right after a restart it is still the one from before. The
    GPUs come last because a kubelet that registers without a device plugin may set them to zero.
    """

    def ready() -> bool:
        ledger.must_run(kubelet_name(node))
        listed = kubectl.items("nodes", f"--field-selector=metadata.name={node.name}")
        return any(
            condition["type"] == "Ready"
            and condition["status"] == "True"
            and datetime.fromisoformat(condition["lastHeartbeatTime"]).timestamp() > since
            for item in listed
            for condition in item["status"].get("conditions", [])
        )

    wait_for(f"{node.name} Ready", ready, deadline_seconds=120, poll_seconds=0.5)
    gpus = {GPU_RESOURCE: str(GPUS_PER_NODE)}
    patch = json.dumps({"status": {"capacity": gpus, "allocatable": gpus}})
    kubectl.run("patch", "node", node.name, "--subresource=status", "-p", patch)


def restart_kubelet(ledger: Ledger, kubectl: Kubectl, node: Node, binaries: Path, pki: Pki) -> None:
    """Start a kubelet that was ended before, and wait until its node is Ready and has its GPUs."""
    since = time.time()
    start_kubelet(ledger, node, binaries, pki)
    wait_ready(ledger, kubectl, node, since=since)


def kill_containers(state: StateFolder, node: Node) -> None:
    """Kill every container of the node at once; its containerd lives on and sees them end."""
    root = state.runc_root(node) / _CONTAINERD_NAMESPACE
    for container in sorted(root.glob("*")):
        _runc(root, "kill", "--all", container.name, "KILL")


def remove_containers(state: StateFolder, node: Node) -> None:
    """Remove every container of a node that is being taken down.

    runc's own record names them, so it works with containerd dead or its socket gone.
    """
    root = state.runc_root(node) / _CONTAINERD_NAMESPACE
    for container in sorted(root.glob("*")):
        _runc(root, "delete", "--force", container.name)
        shutil.rmtree(container, ignore_errors=True)  # where it was never wholly made
        for record in _CNI_RESULTS.glob(f"*-{container.name}-*"):
            record.unlink()
    for record in _CNI_RESULTS.glob(f"{_network_name(node)}-*"):
        record.unlink()
    # Their shims' sockets lie outside the state folder: containerd leaves no choice.
    for address in (state.node(node) / "containerd-run").glob("*/*/*/address"):
        Path(address.read_text().removeprefix("unix://")).unlink(missing_ok=True)


def remove_cgroups() -> None:
    """Remove the nodes' cgroup in every hierarchy, where containers of nobody else are in it."""
    for hierarchy in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*")):
        folder = hierarchy / _CONTAINERD_NAMESPACE
        if folder.is_dir():
            for inner, _, _ in os.walk(folder, topdown=False):
                with suppress(OSError):  # in use by a containerd that is not ours
                    Path(inner).rmdir()


def _runc(root: Path, verb: str, *arguments: str) -> None:
    command = ["runc", "--root", str(root), verb, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # A container may end, or never have been wholly made, while we look.
    gone = "does not exist" in done.stderr or "not running" in done.stderr
    if done.returncode != 0 and not gone:
        raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")


def _ctr(state: StateFolder, node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    socket = str(state.containerd_socket(node))
    command: Sequence[str] = ("ctr", "-a", socket, "-n", _CONTAINERD_NAMESPACE, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _network_name(node: Node) -> str:
    return f"tempflow-{node.name}"


def _pod_network(state: StateFolder, node: Node) -> dict[str, object]:
    return {
        "cniVersion": "1.0.0",
        "name": _network_name(node),
        "plugins": [
            {
                "type": "bridge",
                "bridge": POD_BRIDGE,
                "isGateway": True,
                "hairpinMode": True,  # a pod may reach itself through a service
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(state.node(node) / "addresses"),
                    "ranges": [[{"subnet": node.pod_range, "gateway": node.pod_gateway}]],
                    # No default route: pods reach nodes, pods and services, and nothing else.
                    "routes": [{"dst": CLUSTER_RANGE}],
                },
            }
        ],
    }


def _containerd_config(state: StateFolder, node: Node, sandbox_image: str) -> str:
    folder = state.node(node)
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    # oom_score 0 and restrict_oom_score_adj: a machine without CAP_SYS_RESOURCE may not lower them.
    return f"""version = 2
root = "{folder}/containerd"
state = "{folder}/containerd-run"
oom_score = 0

[grpc]
address = "{state.containerd_socket(node)}"

[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/containerd-opt"

[{cri}]
sandbox_image = "{sandbox_image}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[{cri}.cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{folder}/cni"

[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[{cri}.containerd.runtimes.runc.options]
SystemdCgroup = false
Root = "{state.runc_root(node)}"
"""


def _kubelet_config(state: StateFolder, node: Node, pki: Pki) -> dict[str, object]:
    folder = state.node(node)
    no_name_servers = folder / "resolv.conf"
    no_name_servers.write_text("")
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "port": KUBELET_PORT,
        "healthzBindAddress": LOOPBACK,
        "healthzPort": KUBELET_HEALTH_PORT,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki.ca)},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{state.containerd_socket(node)}",
        "clusterDNS": [DNS_SERVICE_ADDRESS],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": str(no_name_servers),  # pods do not inherit the machine's search domains
        # Two kubelets in one default folder would clean up each other's pods.
        "podLogsDir": str(folder / "pod-logs"),
        "volumePluginDir": str(folder / "volume-plugins"),
        # Machines with cgroups v1 or hybrid, without systemd, with few capabilities.
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "failSwapOn": False,
        # kube-proxy works with nftables: these chains would only stay behind in the machine.
        "makeIPTablesUtilChains": False,
        # Nothing is evicted and no image collected because the machine's disk fills up elsewhere.
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "nodeLeaseDurationSeconds": LEASE_SECONDS,
        "nodeStatusUpdateFrequency": "3s",
        "syncFrequency": "10s",
    }


def _proxy_config(state: StateFolder, node: Node) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(kubeconfig_of(state, "kube-proxy"))},
        "hostnameOverride": node.name,
        "bindAddress": node.address,
        "healthzBindAddress": f"{node.address}:{PROXY_HEALTH_PORT}",
        "metricsBindAddress": f"{LOOPBACK}:{PROXY_METRICS_PORT}",
        "clusterCIDR": CLUSTER_RANGE,
        "detectLocalMode": "ClusterCIDR",
        # Zero leaves the machine's own connection tracking limits as they are.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }
