"""A control plane without nodes: etcd, API server and two controllers, on free ports of loopback.

Enough for what is about objects and not about containers; it starts in seconds, needs no root, and
runs beside a whole cluster.
"""

import json
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.controlplane import AUDIT_POLICY
from tests.cluster.kubectl import JsonObject, Kubectl
from tests.cluster.layout import LOOPBACK
from tests.cluster.waiting import wait_for

OPERATOR = "operator"

_SERVICE_RANGE = "10.202.0.0/24"


@dataclass(frozen=True)
class Bare:
    """A running one."""

    kubectl: Kubectl
    url: str
    token: str
    """Of an administrator."""
    operator_token: str
    """Of the user ``OPERATOR``, who may do nothing until somebody grants it."""
    folder: Path
    """With the logs of all its processes."""

    @property
    def audit_log(self) -> Path:
        return self.folder / "audit.log"


@contextmanager
def running(
    binaries: Path,
    kubectl: Path,
    folder: Path,
    *,
    controllers: str = "job-controller,garbage-collector-controller",
    requests_a_second: int = 200,
) -> Iterator[Bare]:
    """Start one that writes into ``folder``, and end it.

    ``requests_a_second`` is what the controllers may ask for: with their own 20 they would be
    what is tested.
    """
    etcd, peer, api, manager = free_ports(4)
    token, operator_token = secrets.token_hex(16), secrets.token_hex(16)
    key = folder / "service-account.key"
    tokens = folder / "tokens.csv"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    tokens.touch(mode=0o600)
    tokens.write_text(
        f'{token},admin,admin,"system:masters"\n{operator_token},{OPERATOR},{OPERATOR}\n'
    )
    policy = folder / "audit-policy.yaml"
    policy.write_text(json.dumps(AUDIT_POLICY))
    url = f"https://{LOOPBACK}:{api}"
    written = folder / "kubeconfig"
    written.write_text(json.dumps(kubeconfig(url, token)))
    client, own = f"http://{LOOPBACK}:{etcd}", f"http://{LOOPBACK}:{peer}"
    commands = {
        "etcd": [
            *(f"--data-dir={folder / 'etcd'}", "--name=bare", "--log-level=warn"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={own}", f"--initial-advertise-peer-urls={own}"),
            *(f"--initial-cluster=bare={own}", "--unsafe-no-fsync"),
        ],
        "kube-apiserver": [
            *(f"--etcd-servers={client}", f"--bind-address={LOOPBACK}", f"--secure-port={api}"),
            *(f"--cert-dir={folder / 'pki'}", f"--token-auth-file={tokens}"),
            *("--authorization-mode=RBAC", f"--service-cluster-ip-range={_SERVICE_RANGE}"),
            *(f"--service-account-issuer={url}", f"--service-account-key-file={key}"),
            f"--service-account-signing-key-file={key}",
            *(f"--audit-policy-file={policy}", f"--audit-log-path={folder / 'audit.log'}"),
            # Pods name the service account "default", which no controller makes here.
            "--disable-admission-plugins=ServiceAccount",
        ],
        "kube-controller-manager": [
            *(f"--kubeconfig={written}", f"--bind-address={LOOPBACK}"),
            *(f"--secure-port={manager}", f"--cert-dir={folder / 'pki'}", "--leader-elect=false"),
            *(f"--controllers={controllers}", f"--kube-api-qps={requests_a_second}"),
            f"--kube-api-burst={2 * requests_a_second}",
        ],
    }
    found = Kubectl(kubectl, written)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, arguments in commands.items():
            if name == "kube-controller-manager":
                wait_for("the bare API server", found.answers, deadline_seconds=120)
            log = (folder / f"{name}.log").open("wb")
            started.append(subprocess.Popen([binaries / name, *arguments], stdout=log, stderr=log))
        yield Bare(found, url, token, operator_token, folder)
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def kubeconfig(url: str, token: str) -> JsonObject:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bare",
        # The certificate is made at the start, by the server itself, for loopback.
        "clusters": [
            {"name": "bare", "cluster": {"server": url, "insecure-skip-tls-verify": True}}
        ],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "bare", "context": {"cluster": "bare", "user": "admin"}}],
    }
