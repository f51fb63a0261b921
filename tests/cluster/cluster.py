"""A real Kubernetes of two nodes on this one Linux machine, for the tests of the operator.

python tests/cluster/cluster.py up
python tests/cluster/cluster.py kubectl get nodes
python tests/cluster/cluster.py down
"""

import argparse
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from tests.cluster import build, controlplane, images, mounts, network, nodes, pki, s3, s3_server
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl
from tests.cluster.layout import (
    BRIDGE_ADDRESS,
    CLUSTER_RANGE,
    COREDNS_READY_PORT,
    DEFAULT_STATE,
    LONGEST_STATE_PATH,
    NODES,
    Node,
    StateFolder,
)
from tests.cluster.processes import Ledger, marked
from tests.cluster.waiting import Say, progress_lines, wait_for

# etcd, logs, and a small image on two nodes; a trainer image needs 20 GiB more.
_NEEDS_BYTES = 2 * 2**30
# Folders that kubelet, containerd, CNI and ip make, whatever their configuration says.
_HOST_FOLDERS = (
    "/run/containerd",
    "/run/netns",
    "/usr/libexec/kubernetes",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
)
_DEVICE_PLUGIN_SOCKET = Path("/var/lib/kubelet/device-plugins/kubelet.sock")
_CONTAINER_LOGS = Path("/var/log/containers")


@dataclass(frozen=True)
class Cluster:
    """The cluster of one state folder: brings it up and down, and does to it what tests need."""

    state: StateFolder
    binaries: Path
    tools: Path  # kubectl and helm

    @property
    def ledger(self) -> Ledger:
        return Ledger.read(self.state)

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(self.tools / "kubectl", self.state.kubeconfig)

    @property
    def helm(self) -> Path:
        return self.tools / "helm"

    def is_up(self) -> bool:
        """Whether every daemon runs and the API server answers."""
        ledger = self.ledger
        running = all(ledger.running(name) for name in ledger.daemons)
        return ledger.ready and running and self.kubectl.answers()

    def up(self, say: Say) -> None:
        """Bring the cluster up on a machine where nothing of it is left."""
        say(f"start a cluster in {self.state.root}")
        _check_machine(self.state)
        ledger = Ledger(self.state)
        self.state.logs.mkdir(parents=True, exist_ok=True)
        # The folder is nobody's source: whatever repository it lies in, git passes it over.
        (self.state.root / ".gitignore").write_text("*\n")
        ledger.created_paths = [path for path in _HOST_FOLDERS if not Path(path).exists()]
        ledger.write()
        network.create(ledger)
        keys = pki.create(self.state)
        self._start_control_plane(ledger, keys, say)
        self._start_nodes(ledger, keys, say)
        wait_for("the DNS service", _dns_ready, deadline_seconds=60)
        ledger.ready = True
        ledger.write()
        say(f"up: export KUBECONFIG={self.state.kubeconfig}")

    def _start_control_plane(self, ledger: Ledger, keys: pki.Pki, say: Say) -> None:
        controlplane.start_etcd(ledger, self.binaries)
        controlplane.start_apiserver(ledger, self.binaries, keys)
        # The nodes' runtimes need nothing of the control plane: they start while it does.
        for node in NODES:
            nodes.start_containerd(ledger, node, images.BUSYBOX_IMAGE)
        controlplane.wait_apiserver(ledger, self.kubectl)
        say("API server ready")
        controlplane.start_controllers(ledger, self.binaries, keys)
        controlplane.start_dns(ledger, self.kubectl, self.binaries)

    def _start_nodes(self, ledger: Ledger, keys: pki.Pki, say: Say) -> None:
        for node in NODES:
            nodes.wait_containerd(ledger, node)
        archive = self.state.root / "busybox.tar"
        images.write_busybox_archive(archive)
        nodes.load_image(self.state, archive)
        say("containerd has the sandbox image")
        since = time.time()
        for node in NODES:
            nodes.start_proxy(ledger, node, self.binaries)
            nodes.start_kubelet(ledger, node, self.binaries, keys)
        for node in NODES:
            nodes.wait_ready(ledger, self.kubectl, node, since=since)
            say(f"{node.name} ready")

    def load_image(self, archive: Path) -> None:
        """Import a docker or OCI archive into both nodes."""
        if not archive.is_file():
            raise ClusterError(f"{archive} is no file")
        nodes.load_image(self.state, archive.resolve())

    def s3_server(self, say: Say) -> s3_server.S3Server:
        """The cluster's S3 server; the caller starts it."""
        return s3_server.server(self.state, build.seaweedfs(say))

    def kill_kubelet(self, node: Node) -> None:
        """End a node's kubelet at once; its containers go on, as when a node loses its network."""
        self.ledger.end(nodes.kubelet_name(node), grace_seconds=0)

    def kill_containers(self, node: Node) -> None:
        """End all containers of a node whose kubelet was killed: together, the node's power cut."""
        nodes.kill_containers(self.state, node)

    def kill_apiserver(self) -> None:
        """End the API server at once, as a crash would; pods go on, and nobody hears of them."""
        self.ledger.end("kube-apiserver", grace_seconds=0)

    def restart_apiserver(self) -> None:
        """Start it again, and wait until it is ready."""
        ledger = self.ledger
        controlplane.start_apiserver(ledger, self.binaries, pki.Pki(self.state.pki))
        controlplane.wait_apiserver(ledger, self.kubectl)

    def restart_kubelet(self, node: Node) -> None:
        """Start a killed kubelet again, and wait for a Ready node with its GPUs."""
        keys = pki.Pki(self.state.pki)
        nodes.restart_kubelet(self.ledger, self.kubectl, node, self.binaries, keys)


def down(state: StateFolder, say: Say, *, keep_logs: bool = False) -> None:
    """End and remove all that belongs to a state folder: a running cluster, half of one, none."""
    ledger = Ledger.read(state)
    left = list(marked(state))
    if not (state.root.exists() or left or network.bridge_owner() == state.root):
        say("nothing is up")
        return
    for node in NODES:  # first, or they start containers anew
        ledger.end(nodes.kubelet_name(node), grace_seconds=5)
    for process in [*ledger.daemons.values(), *marked(state)]:
        # No grace: the API server takes a minute, and what any of them would save goes away now.
        # Shims too, before their containers: they would report to a containerd that is gone.
        process.end(grace_seconds=0)
    for node in NODES:
        nodes.remove_containers(state, node)
    s3_server.remove_sockets()
    say("processes and containers ended")
    mounts.unmount_below(state.root)
    network.remove(ledger)
    nodes.remove_cgroups()
    _remove_files(ledger, keep_logs=keep_logs)
    say("network, mounts and files removed")


def ensure_up(state: StateFolder, say: Say) -> tuple[Cluster, bool]:
    """The running cluster of that folder, brought up first if needed; and whether it was needed."""
    _check_platform()
    build.install_packages(say)
    cluster = Cluster(state, build.binaries(say), build.kubectl_and_helm(say))
    with _alone(state):
        if cluster.is_up():
            say(f"already up: export KUBECONFIG={state.kubeconfig}")
            return cluster, False
        if state.ledger.exists() or any(marked(state)) or network.bridge_owner() == state.root:
            say("found half a cluster: remove it first")
            down(state, say)
        cluster.up(say)
        return cluster, True


def _check_platform() -> None:
    if platform.system() != "Linux":
        raise ClusterError(f"needs Linux: this is {platform.system()}")
    if os.geteuid() != 0:
        raise ClusterError("needs root: it makes network namespaces, mounts and containers")


def _check_machine(state: StateFolder) -> None:
    if len(str(state.root)) > LONGEST_STATE_PATH:
        raise ClusterError(
            f"the path {state.root} is longer than {LONGEST_STATE_PATH}: sockets in it would not "
            "work; name another folder with --state"
        )
    owner = network.bridge_owner()
    if owner is not None:
        raise ClusterError(
            f"another test cluster is up: end it with --state {owner} down (one a machine)"
        )
    network.check_range_free()
    for address, port, needed_by in controlplane.PORTS:
        network.check_port_free(address, port, needed_by)
    free = network.free_bytes(state.root)
    if free < _NEEDS_BYTES:
        raise ClusterError(
            f"{free / 2**30:.1f} GiB of disk are free at {state.root}, "
            f"the cluster needs {_NEEDS_BYTES / 2**30:.0f}"
        )


@contextmanager
def _alone(state: StateFolder) -> Iterator[None]:
    """Hold the lock of the folder that holds the state folder: one `up` or `down` at a time."""
    state.root.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(state.root.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _dns_ready() -> bool:
    url = f"http://127.0.0.1:{COREDNS_READY_PORT}/ready"
    return s3.request("GET", url)[0] == 200


def _remove_files(ledger: Ledger, *, keep_logs: bool) -> None:
    state = ledger.state
    if _CONTAINER_LOGS.is_dir():
        for link in _CONTAINER_LOGS.iterdir():
            if link.is_symlink() and link.readlink().is_relative_to(state.root):
                link.unlink()
    if str(_DEVICE_PLUGIN_SOCKET.parents[1]) in ledger.created_paths:
        _DEVICE_PLUGIN_SOCKET.unlink(missing_ok=True)
    for path in map(Path, ledger.created_paths):
        network.remove_if_empty(path)
    if not keep_logs:
        shutil.rmtree(state.root, ignore_errors=True)
        return
    for entry in state.root.iterdir():
        if entry != state.logs and entry.name != ".gitignore":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _status(state: StateFolder) -> int:
    """Print every daemon and, when the API server answers, the nodes; 0 when all is up, else 3."""
    ledger = Ledger.read(state)
    if not ledger.daemons:
        print("down")
        return 3
    for name, process in ledger.daemons.items():
        print(f"{name:24} pid {process.pid:<8} {'running' if process.alive() else 'ENDED'}")
    cluster = Cluster(state, build.binaries(print), build.kubectl_and_helm(print))
    if not cluster.is_up():
        return 3
    print(f"{CLUSTER_RANGE}, machine {BRIDGE_ADDRESS}, KUBECONFIG={state.kubeconfig}")
    print(cluster.kubectl.run("get", "nodes", "-o", "wide"), end="")
    return 0


def _kubectl(state: StateFolder, arguments: Sequence[str]) -> int:
    if not state.kubeconfig.exists():
        raise ClusterError(f"no cluster is up in {state.root}")
    tools = build.kubectl_and_helm(lambda _: None)
    kubectl = Kubectl(tools / "kubectl", state.kubeconfig)
    command = [str(kubectl.binary), *arguments]
    return subprocess.run(command, env=kubectl.environment(), check=False).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster.py", description="A real two-node Kubernetes on this machine, for tests."
    )
    parser.add_argument(
        *("--state", "-s"),
        type=lambda text: Path(text).resolve(),
        default=DEFAULT_STATE,
        help="folder for all that the cluster writes (default: %(default)s)",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="start it; does nothing when it is up, and repairs half a cluster")
    end = verbs.add_parser("down", help="end it and remove all that it made on this machine")
    end.add_argument("--keep-logs", action="store_true", help="leave the folder of logs")
    verbs.add_parser("status", help="say what runs; exit code 0 when all does, else 3")
    load = verbs.add_parser("load-image", help="import an image into both nodes")
    load.add_argument("archive", type=Path, help="a docker or OCI archive")
    verbs.add_parser("kubectl", help="run kubectl on it with the arguments that follow")
    return parser


def _run(options: argparse.Namespace, for_kubectl: Sequence[str]) -> int:
    state = StateFolder(options.state)
    say = progress_lines()
    match options.verb:
        case "up":
            ensure_up(state, say)
        case "down":
            _check_platform()
            with _alone(state):
                down(state, say, keep_logs=options.keep_logs)
        case "status":
            return _status(state)
        case "load-image":
            cluster = Cluster(state, build.binaries(say), build.kubectl_and_helm(say))
            if not cluster.is_up():
                raise ClusterError(f"no cluster is up in {state.root}")
            cluster.load_image(options.archive)
            say(f"{options.archive} is on both nodes")
        case "kubectl":
            return _kubectl(state, for_kubectl)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run one verb; an expected failure is one line on standard error and exit code 1."""
    # Cut here: argparse would take kubectl's options for its own.
    end = arguments.index("kubectl") + 1 if "kubectl" in arguments else len(arguments)
    try:
        return _run(_parser().parse_args(arguments[:end]), arguments[end:])
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
