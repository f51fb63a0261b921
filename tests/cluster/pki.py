"""Certificates and tokens of the control plane.

Only what cannot be a token is a certificate: the API server's own, and what it shows to kubelets.
Everybody else comes with a bearer token from one file, which makes a kubeconfig three lines.
"""

import secrets
import subprocess
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.errors import ClusterError
from tests.cluster.layout import (
    API_PORT,
    BRIDGE_ADDRESS,
    CLUSTER_DOMAIN,
    KUBERNETES_SERVICE_ADDRESS,
    NODES,
    StateFolder,
)

# User names and groups are those that the API server's built-in RBAC roles are bound to.
COMPONENTS: dict[str, tuple[str, str]] = {
    "admin": ("tempflow-admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", ""),
    "kube-scheduler": ("system:kube-scheduler", ""),
    "kube-proxy": ("system:kube-proxy", ""),
    "coredns": ("system:coredns", ""),
    **{f"kubelet-{node.name}": (f"system:node:{node.name}", "system:nodes") for node in NODES},
}

_LIFETIME_DAYS = "30"


@dataclass(frozen=True)
class Pki:
    """The files that `create` has written."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def service_account_key(self) -> Path:
        return self.folder / "service-account.key"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens.csv"

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"


def create(state: StateFolder) -> Pki:
    """Write authority, certificates, tokens and a kubeconfig a component; return where they are."""
    pki = Pki(state.pki)
    state.pki.mkdir(parents=True, mode=0o700, exist_ok=True)
    state.config.mkdir(parents=True, mode=0o700, exist_ok=True)
    _authority(pki)
    names = (
        f"IP:127.0.0.1,IP:{BRIDGE_ADDRESS},IP:{KUBERNETES_SERVICE_ADDRESS},DNS:localhost,"
        f"DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,"
        f"DNS:kubernetes.default.svc.{CLUSTER_DOMAIN}"
    )
    _signed(pki, "apiserver", "/CN=kube-apiserver", f"subjectAltName={names}")
    _signed(
        pki,
        "kubelet-client",
        "/O=system:masters/CN=kube-apiserver-kubelet-client",
        "extendedKeyUsage=clientAuth",
    )
    _openssl(*_new_key(pki.service_account_key))
    _tokens(state, pki)
    return pki


def _authority(pki: Pki) -> None:
    _openssl(*_new_key(pki.key("ca")))
    _openssl(
        *("req", "-x509", "-new", "-key", pki.key("ca"), "-out", pki.ca),
        *("-days", _LIFETIME_DAYS, "-subj", "/CN=tempflow-test-cluster"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )


def _signed(pki: Pki, name: str, subject: str, extension: str) -> None:
    request = pki.folder / f"{name}.csr"
    extensions = pki.folder / f"{name}.ext"
    extensions.write_text(extension + "\n")
    _openssl(*_new_key(pki.key(name)))
    _openssl("req", "-new", "-key", pki.key(name), "-subj", subject, "-out", request)
    _openssl(
        *("x509", "-req", "-in", request, "-CA", pki.ca, "-CAkey", pki.key("ca")),
        *("-CAcreateserial", "-days", _LIFETIME_DAYS, "-extfile", extensions),
        *("-out", pki.certificate(name)),
    )


def _new_key(path: Path) -> tuple[str | Path, ...]:
    # P-256, not RSA: four keys take 0.05 s in place of a second or more.
    return ("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


def _openssl(*arguments: str | Path) -> None:
    command = ["openssl", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-300:]}")


def _tokens(state: StateFolder, pki: Pki) -> None:
    lines = []
    for component, (user, group) in COMPONENTS.items():
        token = secrets.token_hex(24)
        lines.append(f'{token},{user},{user},"{group}"' if group else f"{token},{user},{user}")
        _kubeconfig(kubeconfig_of(state, component), pki.ca.read_text(), token)
    pki.tokens.touch(mode=0o600)
    pki.tokens.write_text("\n".join(lines) + "\n")


def kubeconfig_of(state: StateFolder, component: str) -> Path:
    """The kubeconfig of one of COMPONENTS."""
    if component == "admin":
        return state.kubeconfig
    return state.config / f"{component}.kubeconfig"


def _kubeconfig(path: Path, authority: str, token: str) -> None:
    name = "tempflow-test"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": name,
                "cluster": {
                    "server": f"https://{BRIDGE_ADDRESS}:{API_PORT}",
                    "certificate-authority-data": b64encode(authority.encode()).decode(),
                },
            }
        ],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
