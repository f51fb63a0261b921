"""Where everything of the test cluster is: its addresses, ports, nodes, and files.

Two nodes share one machine. Node 1 lives in the machine's own network namespace, node 2 in one of
its own; a bridge joins them and is also the address of the control plane, of DNS and of S3:

    machine ── tempflow0 10.201.0.1 ──veth── node 2 10.201.0.2
       └─ pods of node 1: 10.201.1.0/24         └─ pods of node 2: 10.201.2.0/24
"""

import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# containerd's and the kubelet's sockets lie in the state folder, and a socket's path ends at 107
# bytes; the longest of them adds 45 to the folder's own.
LONGEST_STATE_PATH = 60
_BESIDE_THE_CODE = REPOSITORY / ".cluster"
DEFAULT_STATE = (
    _BESIDE_THE_CODE
    if len(str(_BESIDE_THE_CODE)) <= LONGEST_STATE_PATH
    else Path("/var/lib/tempflow-cluster")
)

# Nodes, pods and services together: the only range that pods get a route to.
CLUSTER_RANGE = "10.201.0.0/16"
BRIDGE = "tempflow0"
BRIDGE_ADDRESS = "10.201.0.1"
BRIDGE_PREFIX_BITS = 24
NODE_LINK = "tempflow-up2"
SERVICE_RANGE = "10.201.100.0/24"
KUBERNETES_SERVICE_ADDRESS = "10.201.100.1"
DNS_SERVICE_ADDRESS = "10.201.100.10"
POD_BRIDGE = "tempflow-pods"
CLUSTER_DOMAIN = "cluster.local"

# On loopback, away from the usual ports: a developer's own etcd or cluster is not in the way.
LOOPBACK = "127.0.0.1"
ETCD_PORT = 12379
ETCD_PEER_PORT = 12380
CONTROLLER_MANAGER_PORT = 12257
SCHEDULER_PORT = 12259
COREDNS_HEALTH_PORT = 12080
COREDNS_READY_PORT = 12181
KUBELET_HEALTH_PORT = 12248
PROXY_METRICS_PORT = 12249
# On the bridge and on node 2's own address.
API_PORT = 6443
KUBELET_PORT = 10250
PROXY_HEALTH_PORT = 10256
DNS_PORT = 53
S3_PORT = 8333

# Names a cluster to test instead of our own. Not KUBECONFIG itself, which most shells of a
# developer have: no cluster is tested because it happened to be there.
KUBECONFIG_VARIABLE = "TEMPFLOW_TEST_KUBECONFIG"

# Daemons carry this variable with their state folder as its value: `down` finds them, and the
# containerd shims that inherit it, even after the folder with the recorded pids was deleted.
MARK = "TEMPFLOW_CLUSTER_STATE"

GPU_RESOURCE = "nvidia.com/gpu"
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Node:
    """One node: its name, its address on the bridge, its pods, and its network namespace."""

    name: str
    address: str
    pod_range: str
    pod_gateway: str
    namespace: str | None  # None: the machine's own


NODE_1 = Node("node-1", BRIDGE_ADDRESS, "10.201.1.0/24", "10.201.1.1", None)
NODE_2 = Node("node-2", "10.201.0.2", "10.201.2.0/24", "10.201.2.1", "tempflow-node-2")
NODES = (NODE_1, NODE_2)


def node_named(name: str) -> Node:
    """The node of that name; KeyError names what was asked for."""
    return {node.name: node for node in NODES}[name]


@dataclass(frozen=True)
class StateFolder:
    """The folder that holds all that a running cluster writes, and what lies where in it."""

    root: Path

    @property
    def ledger(self) -> Path:
        return self.root / "state.json"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.root / "kubeconfig"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def audit_log(self) -> Path:
        """One JSON line a request that the API server answered: who, what verb, which resource."""
        return self.logs / "audit.log"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def etcd(self) -> Path:
        return self.root / "etcd"

    @property
    def s3(self) -> Path:
        return self.root / "s3"

    @property
    def config(self) -> Path:
        """Configuration files and the kubeconfigs of the components."""
        return self.root / "config"

    def node(self, node: Node) -> Path:
        return self.root / node.name

    def containerd_socket(self, node: Node) -> Path:
        return self.node(node) / "containerd.sock"

    def runc_root(self, node: Node) -> Path:
        """runc's own record of the node's containers: enough to end them without containerd."""
        return self.node(node) / "runc"


def cache_folder() -> Path:
    """Where built binaries and test tools are kept from one cluster to the next."""
    configured = os.environ.get("TEMPFLOW_CLUSTER_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "tempflow-cluster"
