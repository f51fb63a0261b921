"""The cluster that the tests run against: ours on this machine, or one that is there already."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import build, images
from tests.cluster.cluster import Cluster
from tests.cluster.kubectl import Kubectl
from tests.cluster.waiting import Say

KUBECONFIG_VARIABLE = "TEMPFLOW_TEST_KUBECONFIG"
BUSYBOX_VARIABLE = "TEMPFLOW_TEST_BUSYBOX_IMAGE"


@dataclass(frozen=True)
class Target:
    """What every cluster test needs, and what only our own cluster can do."""

    kubectl: Kubectl
    helm: Path
    busybox_image: str
    own: Cluster | None

    def our_own(self) -> Cluster:
        """Our own cluster; a test that asks for it is skipped where another one is used."""
        if self.own is None:
            pytest.skip(
                f"{KUBECONFIG_VARIABLE} names a cluster whose nodes this test may not touch"
            )
        return self.own


def own(cluster: Cluster) -> Target:
    return Target(cluster.kubectl, cluster.helm, images.BUSYBOX_IMAGE, cluster)


def foreign(kubeconfig: str, say: Say) -> Target:
    """The cluster of a kubeconfig, with an image that its nodes can pull."""
    tools = build.kubectl_and_helm(say)
    image = os.environ.get(BUSYBOX_VARIABLE, "busybox:1.37")
    return Target(Kubectl(tools / "kubectl", Path(kubeconfig)), tools / "helm", image, None)
