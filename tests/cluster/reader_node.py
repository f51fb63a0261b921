"""What a scheduler and a kubelet do about reader pods, for tests on an API server alone."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tempflow_api import naming
from tempflow_trainer.reader import Reader
from tempflow_trainer.store import FolderStore
from tests.cluster.apiserver import ApiServer
from tests.cluster.client_objects import RUNNING_POD, pod_status
from tests.cluster.kubectl import JsonObject
from tests.cluster.kubelet import Kubelet

IMAGE = "localhost/none"
NODE = "reader-node"


@dataclass
class Node:
    """Takes reader pods, and lets them run or not."""

    api: ApiServer
    kubelet: Kubelet
    reader: Reader
    state: JsonObject = field(default_factory=lambda: RUNNING_POD)
    phase: str = "Running"
    """What becomes of the next pod; empty leaves it pending."""
    seen: list[JsonObject] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        while not self.over.wait(0.2):
            try:
                pods = readers(self.api)
            except Exception:
                continue
            for pod in pods:
                if pod["metadata"]["name"] not in self.names():
                    self.take(pod)

    def names(self) -> list[str]:
        return [pod["metadata"]["name"] for pod in self.seen]

    def take(self, pod: JsonObject) -> None:
        name = pod["metadata"]["name"]
        self.seen.append(pod)
        if not self.phase:
            return
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": NODE},
        }
        path = f"/api/v1/namespaces/default/pods/{name}/binding"
        self.api.kubectl.run("create", "--raw", path, "-f", "-", stdin=json.dumps(binding))
        self.kubelet.ports[name] = self.reader.port
        status = pod_status(self.phase, self.state)
        status["containerStatuses"][0].update(name=naming.ROLE_READER, image=IMAGE)
        self.api.write_status("Pod", name, status)


def readers(api: ApiServer) -> list[JsonObject]:
    """Those that nobody has deleted; a kubelet that stops them there is not."""
    pods = api.kubectl.items("pods", "-l", f"{naming.LABEL_ROLE}={naming.ROLE_READER}")
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


@contextmanager
def taking_readers(api: ApiServer, kubelet: Kubelet, store: Path) -> Iterator[Node]:
    """A node whose readers read that folder; at the end no reader pod is left."""
    node = Node(api, kubelet, Reader(FolderStore(store), port=0))
    threads = [threading.Thread(target=node.work), threading.Thread(target=node.reader.serve)]
    for thread in threads:
        thread.start()
    try:
        yield node
    finally:
        node.over.set()
        node.reader.stop()
        for thread in threads:
            thread.join()
        api.kubectl.run(
            *("delete", "pods", "-l", f"{naming.LABEL_ROLE}={naming.ROLE_READER}"),
            *("--force", "--grace-period=0", "--wait=false"),
        )
