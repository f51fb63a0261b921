"""The cluster that the tests run against: ours on this machine, or one that is there already."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.kubectl import JsonObject, Kubectl
from tests.cluster.layout import GPU_RESOURCE, KUBECONFIG_VARIABLE


@dataclass(frozen=True)
class Target:
    """What every cluster test needs, and what only our own cluster can do."""

    kubectl: Kubectl
    helm: Path
    busybox_image: str
    logs: Path
    """The folder for what tests keep of the logs."""
    own: Cluster | None

    def our_own(self, what: str) -> Cluster:
        """Our own cluster, for a test that needs ``what`` of it; where another cluster is used, the
        test is left out and says so."""
        if self.own is None:
            pytest.skip(f"needs {what}; {KUBECONFIG_VARIABLE} names a cluster that is not ours")
        return self.own

    def nodes(self) -> list[JsonObject]:
        """Those that take any pod."""
        return [node for node in self.kubectl.items("nodes") if _takes_any_pod(node)]

    def node_names(self) -> list[str]:
        return sorted(node["metadata"]["name"] for node in self.nodes())

    def gpus_of_a_node(self) -> int:
        """Of the one that offers most."""
        offered = [node["status"]["allocatable"].get(GPU_RESOURCE, "0") for node in self.nodes()]
        return max(map(int, offered), default=0)


def own(cluster: Cluster) -> Target:
    logs = cluster.state.logs
    return Target(cluster.kubectl, cluster.helm, images.BUSYBOX_IMAGE, logs, cluster)


def _takes_any_pod(node: JsonObject) -> bool:
    effects = {taint["effect"] for taint in node["spec"].get("taints", ())}
    return not node["spec"].get("unschedulable") and effects <= {"PreferNoSchedule"}
