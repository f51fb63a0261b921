"""etcd and an API server alone, on free ports of loopback: for tests of what only talks to them.

No node, no scheduler: pods are objects whose status the tests write. A ``Kubelet`` gives such pods
logs, through the API server, as a real one does.
"""

import secrets
import socket
import time
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.cluster import pki
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import JsonObject, Kubectl
from tests.cluster.layout import LOOPBACK, StateFolder
from tests.cluster.processes import Ledger
from tests.cluster.waiting import wait_for

_ADMIN = "tempflow-admin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@dataclass
class ApiServer:
    """One of a test's own; ``stop`` and ``start`` again keep what it stores."""

    state: StateFolder
    binaries: Path
    kubectl_binary: Path
    port: int = field(default_factory=free_port)
    etcd_port: int = field(default_factory=free_port)
    peer_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self._ledger = Ledger(self.state)
        self._pki = pki.create(self.state)
        self._tokens = {"admin": secrets.token_hex(16), "nobody": secrets.token_hex(16)}
        self._pki.tokens.write_text(
            f'{self._tokens["admin"]},{_ADMIN},{_ADMIN},"system:masters"\n'
            f"{self._tokens['nobody']},nobody,nobody\n"
        )

    @property
    def url(self) -> str:
        return f"https://{LOOPBACK}:{self.port}"

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(self.kubectl_binary, self.kubeconfig("admin"))

    @property
    def authority(self) -> Path:
        return self._pki.ca

    def token(self, user: str) -> str:
        return self._tokens[user]

    def kubeconfig(self, user: str, *, token: str | None = None, **cluster: object) -> Path:
        """Of ``admin``, who may do everything, or ``nobody``, or of a token that is given."""
        path = self.state.config / f"{user}-{secrets.token_hex(4)}.kubeconfig"
        authority = b64encode(self._pki.ca.read_bytes()).decode()
        about = {"server": self.url, "certificate-authority-data": authority, **cluster}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": about}],
            "users": [{"name": user, "user": {"token": token or self._tokens[user]}}],
            "contexts": [{"name": user, "context": {"cluster": "test", "user": user}}],
            "current-context": user,
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(content))
        return path

    def start_etcd(self) -> None:
        client, peer = f"http://{LOOPBACK}:{self.etcd_port}", f"http://{LOOPBACK}:{self.peer_port}"
        self._ledger.start(
            "etcd",
            [
                *(self.binaries / "etcd", "--name=test", f"--data-dir={self.state.etcd}"),
                *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
                *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
                *(f"--initial-cluster=test={peer}", "--log-level=warn", "--unsafe-no-fsync"),
            ],
        )

    def start(self) -> None:
        """Returns once it says that it is ready."""
        self._ledger.start(
            "kube-apiserver",
            [
                *(self.binaries / "kube-apiserver",),
                f"--etcd-servers=http://{LOOPBACK}:{self.etcd_port}",
                *(f"--bind-address={LOOPBACK}", f"--secure-port={self.port}"),
                f"--advertise-address={LOOPBACK}",
                "--endpoint-reconciler-type=none",
                f"--tls-cert-file={self._pki.certificate('apiserver')}",
                f"--tls-private-key-file={self._pki.key('apiserver')}",
                *(f"--cert-dir={self.state.pki}", f"--token-auth-file={self._pki.tokens}"),
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-signing-key-file={self._pki.service_account_key}",
                f"--service-account-key-file={self._pki.service_account_key}",
                *("--authorization-mode=RBAC", "--service-cluster-ip-range=10.202.0.0/24"),
                # Nobody makes service accounts here, and pods are only written down.
                "--disable-admission-plugins=ServiceAccount",
                f"--kubelet-client-certificate={self._pki.certificate('kubelet-client')}",
                f"--kubelet-client-key={self._pki.key('kubelet-client')}",
            ],
        )

        def ready() -> bool:
            self._ledger.must_run("etcd")
            self._ledger.must_run("kube-apiserver")
            return self.kubectl.answers()

        wait_for("an API server that is ready", ready, deadline_seconds=90, poll_seconds=0.1)

    def start_garbage_collector(self) -> None:
        """Deletes what has lost its owner. To be started when all kinds are there: it looks for new
        ones every half minute only."""
        self._ledger.start(
            "kube-controller-manager",
            [
                *(self.binaries / "kube-controller-manager", "--leader-elect=false"),
                *(f"--kubeconfig={self.kubeconfig('admin')}", "--secure-port=0"),
                "--controllers=garbage-collector-controller",
            ],
        )

    def serves(self, plural: str) -> bool:
        try:
            self.kubectl.run("get", plural)
        except ClusterError:
            return False
        return True

    def stop(self) -> None:
        """At once, as a machine that loses its power."""
        self._ledger.end("kube-apiserver", grace_seconds=0)

    def restart(self, *, away_seconds: float = 0) -> None:
        self.stop()
        time.sleep(away_seconds)
        self.start()

    def end(self) -> None:
        for name in list(self._ledger.daemons):
            self._ledger.end(name, grace_seconds=0)

    def certificate(self) -> tuple[Path, Path]:
        """Certificate and key of a server on loopback."""
        return self._pki.certificate("apiserver"), self._pki.key("apiserver")

    def create(self, raw: JsonObject) -> JsonObject:
        """The object as it is stored; ``status`` is written, too."""
        self.kubectl.apply({key: value for key, value in raw.items() if key != "status"})
        meta = raw["metadata"]
        if "status" in raw:
            self.write_status(raw["kind"], meta["name"], raw["status"], meta.get("namespace"))
        return self.kubectl.get(
            raw["kind"], meta["name"], namespace=meta.get("namespace", "default")
        )

    def write_status(
        self, kind: str, name: str, status: JsonObject, namespace: str | None = None
    ) -> None:
        change = yaml.safe_dump({"status": status})
        self.kubectl.run(
            *("patch", kind, name, "-n", namespace or "default", "--subresource=status"),
            *("--type=merge", "-p", change),
        )
