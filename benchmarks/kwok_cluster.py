"""A real control plane whose nodes KWOK plays: pods are scheduled and run, without containers.

etcd, API server, controller-manager with all its controllers, and scheduler are those of the test
cluster; KWOK (https://kwok.sigs.k8s.io) is built from its Go module. All of it, with the addresses
of the pods, is in a network of its own, from which nothing goes out.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tempflow_api import crd, naming
from tests.cluster import bare, build
from tests.cluster.bare import Bare
from tests.cluster.errors import ClusterError
from tests.cluster.layout import LOOPBACK
from tests.cluster.waiting import Say, wait_for

NODES = 64
# The default of 20 would make the controllers what is measured.
REQUESTS_A_SECOND = 1000

_MODULE = Path(__file__).resolve().parent / "kwok"
_PROGRAM = build.GoProgram("kwok", str(_MODULE), "sigs.k8s.io/kwok/cmd/kwok", "-s -w")
# What a node and a pod do; without `pod-complete`, which would end every Job's pods at once.
_STAGES = (
    "node/fast/node-initialize",
    "node/heartbeat-with-lease/node-heartbeat-with-lease",
    "pod/fast/pod-ready",
    "pod/fast/pod-delete",
)
# Of the pods, from the range kept for benchmarks (RFC 2544), and not of loopback: the API server
# refuses endpoints that have such addresses, and the controllers try again for ever.
_FIRST_POD, _PODS = "198.18.0.1", "198.18.0.0/15"
_CLONE_NEWNET = 0x40000000


@contextmanager
def running(folder: Path, say: Say) -> Iterator[Bare]:
    """Start one with ``NODES`` ready nodes and the project's resource definition, and end it.

    This process has a network of its own from then on.
    """
    binaries, kubectl = build.binaries(say), build.kubectl_and_helm(say) / "kubectl"
    kwok = build.program(_PROGRAM, say)
    _leave_network()
    with bare.running(
        binaries, kubectl, folder, controllers="*", requests_a_second=REQUESTS_A_SECOND
    ) as server:
        kubeconfig = server.kubectl.kubeconfig
        commands: dict[str, list[str]] = {
            "kube-scheduler": [
                *(str(binaries / "kube-scheduler"), f"--kubeconfig={kubeconfig}"),
                *(f"--bind-address={LOOPBACK}", f"--secure-port={bare.free_ports(1)[0]}"),
                *(f"--cert-dir={folder / 'pki'}", "--leader-elect=false"),
                f"--kube-api-qps={REQUESTS_A_SECOND}",
                f"--kube-api-burst={2 * REQUESTS_A_SECOND}",
            ],
            "kwok": [
                *(str(kwok), f"--kubeconfig={kubeconfig}", "--manage-all-nodes=true"),
                *(f"--cidr={_FIRST_POD}/15", f"--node-ip={LOOPBACK}"),
                *(f"--config={_stages(folder)}", "--node-lease-duration-seconds=40"),
            ],
        }
        processes = [_start(name, command, folder) for name, command in commands.items()]
        try:
            _define(server)
            _make_nodes(server)
            yield server
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _leave_network() -> None:
    """Needs root, and to be the only thread of this process: the others would stay behind."""
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise ClusterError("no network of its own can be made: run the benchmark as root, on Linux")
    for words in (
        ("link", "set", "lo", "up"),
        # Whoever asks a pod for something asks this machine.
        ("route", "add", "local", _PODS, "dev", "lo"),
        # The API server looks for the address of a way out, and finds one that ends here.
        ("link", "add", "nowhere", "type", "bridge"),
        ("address", "add", "192.0.2.1/24", "dev", "nowhere"),
        ("link", "set", "nowhere", "up"),
        ("route", "add", "default", "dev", "nowhere"),
    ):
        subprocess.run(["ip", *words], check=True)


def _start(name: str, command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _stages(folder: Path) -> Path:
    """KWOK's own stages, out of its module, in one file."""
    listed = subprocess.run(
        ["go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok"],
        cwd=_MODULE,
        capture_output=True,
        text=True,
        check=True,
    )
    stages = Path(listed.stdout.strip()) / "kustomize" / "stage"
    texts = [(stages / f"{stage}.yaml").read_text() for stage in _STAGES]
    together = folder / "stages.yaml"
    together.write_text("\n---\n".join(texts))
    return together


def _define(server: Bare) -> None:
    server.kubectl.run("apply", "-f", "-", stdin=crd.document())
    server.kubectl.wait_established(f"{naming.PLURAL}.{naming.GROUP}")

    def watchable() -> bool:
        # Established is said before it is served, and served before it can be watched.
        query = "?watch=1&resourceVersion=0&timeoutSeconds=1"
        try:
            server.kubectl.run("get", "--raw", f"/apis/{naming.API_VERSION}/{naming.PLURAL}{query}")
        except ClusterError:
            return False
        return True

    wait_for("our kind", watchable, deadline_seconds=60)


def _make_nodes(server: Bare) -> None:
    names = [f"node-{number}" for number in range(NODES)]
    server.kubectl.apply(
        *(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            }
            for name in names
        )
    )

    def schedulable() -> bool:
        nodes = server.kubectl.items("nodes")
        return all(not node["spec"].get("taints") for node in nodes) and len(nodes) == NODES

    wait_for(f"{NODES} nodes that take pods", schedulable, deadline_seconds=120, poll_seconds=1)


def machine() -> str:
    """What the figures were taken on, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = models[0] if models else "an unknown processor"
    return f"{os.cpu_count()} cores of {processor}, {memory:.0f} GiB of memory"
