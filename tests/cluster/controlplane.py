"""The control plane: etcd, API server, controller-manager, scheduler and DNS."""

import json
from pathlib import Path

import yaml

from tests.cluster.kubectl import JsonObject, Kubectl
from tests.cluster.layout import (
    API_PORT,
    BRIDGE_ADDRESS,
    CLUSTER_DOMAIN,
    CONTROLLER_MANAGER_PORT,
    COREDNS_HEALTH_PORT,
    COREDNS_READY_PORT,
    DNS_PORT,
    DNS_SERVICE_ADDRESS,
    ETCD_PEER_PORT,
    ETCD_PORT,
    LOOPBACK,
    SCHEDULER_PORT,
    SERVICE_RANGE,
    StateFolder,
)
from tests.cluster.nodes import NODE_GRACE_SECONDS
from tests.cluster.pki import COMPONENTS, Pki, kubeconfig_of
from tests.cluster.processes import Ledger
from tests.cluster.waiting import wait_for

# Every listening port, for the check before the start: (address, port, who needs it).
PORTS = (
    (LOOPBACK, ETCD_PORT, "etcd"),
    (LOOPBACK, ETCD_PEER_PORT, "etcd"),
    (LOOPBACK, CONTROLLER_MANAGER_PORT, "kube-controller-manager"),
    (LOOPBACK, SCHEDULER_PORT, "kube-scheduler"),
    (LOOPBACK, COREDNS_HEALTH_PORT, "coredns"),
    (LOOPBACK, COREDNS_READY_PORT, "coredns"),
    (BRIDGE_ADDRESS, API_PORT, "kube-apiserver"),
    (BRIDGE_ADDRESS, DNS_PORT, "coredns"),
)


def start_etcd(ledger: Ledger, binaries: Path) -> None:
    client, peer = f"http://{LOOPBACK}:{ETCD_PORT}", f"http://{LOOPBACK}:{ETCD_PEER_PORT}"
    ledger.start(
        "etcd",
        [
            *(binaries / "etcd", "--name=test", f"--data-dir={ledger.state.etcd}"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
            *(f"--initial-cluster=test={peer}", "--log-level=warn"),
            "--unsafe-no-fsync",  # what a power cut would lose is thrown away anyway
        ],
    )


def start_apiserver(ledger: Ledger, binaries: Path, pki: Pki) -> None:
    state = ledger.state
    policy = state.config / "audit-policy.yaml"
    policy.write_text(yaml.safe_dump(AUDIT_POLICY))
    ledger.start(
        "kube-apiserver",
        [
            *(binaries / "kube-apiserver", f"--etcd-servers=http://{LOOPBACK}:{ETCD_PORT}"),
            *(f"--bind-address={BRIDGE_ADDRESS}", f"--secure-port={API_PORT}"),
            f"--advertise-address={BRIDGE_ADDRESS}",
            f"--tls-cert-file={pki.certificate('apiserver')}",
            f"--tls-private-key-file={pki.key('apiserver')}",
            f"--cert-dir={state.pki}",
            f"--token-auth-file={pki.tokens}",
            f"--service-account-issuer=https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
            f"--service-account-signing-key-file={pki.service_account_key}",
            f"--service-account-key-file={pki.service_account_key}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--allow-privileged",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={pki.certificate('kubelet-client')}",
            f"--kubelet-client-key={pki.key('kubelet-client')}",
            *(f"--audit-policy-file={policy}", f"--audit-log-path={state.audit_log}"),
            "--audit-log-maxsize=1000",
        ],
    )


def wait_apiserver(ledger: Ledger, kubectl: Kubectl) -> None:
    def ready() -> bool:
        ledger.must_run("etcd")
        ledger.must_run("kube-apiserver")
        return kubectl.answers()

    wait_for("an API server that is ready", ready, deadline_seconds=120)


def start_controllers(ledger: Ledger, binaries: Path, pki: Pki) -> None:
    """The controller-manager and the scheduler."""
    state = ledger.state
    manager, scheduler = "kube-controller-manager", "kube-scheduler"
    # The default of 20 requests a second is what tests with many pods would measure.
    requests = ("--kube-api-qps=200", "--kube-api-burst=400")
    ledger.start(
        manager,
        [
            *(binaries / manager, f"--kubeconfig={kubeconfig_of(state, manager)}", *requests),
            *(f"--bind-address={LOOPBACK}", f"--secure-port={CONTROLLER_MANAGER_PORT}"),
            *(f"--cert-dir={state.pki}", "--leader-elect=false"),
            f"--service-account-private-key-file={pki.service_account_key}",
            f"--root-ca-file={pki.ca}",
            "--use-service-account-credentials",
            f"--flex-volume-plugin-dir={state.root / 'volume-plugins'}",
            f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
            "--node-monitor-period=2s",
        ],
    )
    ledger.start(
        scheduler,
        [
            *(binaries / scheduler, f"--kubeconfig={kubeconfig_of(state, scheduler)}", *requests),
            *(f"--bind-address={LOOPBACK}", f"--secure-port={SCHEDULER_PORT}"),
            *(f"--cert-dir={state.pki}", "--leader-elect=false"),
        ],
    )


def start_dns(ledger: Ledger, kubectl: Kubectl, binaries: Path) -> None:
    """CoreDNS on the bridge, behind the usual service address."""
    corefile = ledger.state.config / "Corefile"
    corefile.write_text(_corefile(ledger.state))
    kubectl.apply(*_dns_objects())
    ledger.start("coredns", [binaries / "coredns", "-conf", corefile])


def _corefile(state: StateFolder) -> str:
    # Short times to live: a pod that replaces another under the same name is found at once.
    return f""".:{DNS_PORT} {{
    bind {BRIDGE_ADDRESS}
    errors
    health {LOOPBACK}:{COREDNS_HEALTH_PORT}
    ready {LOOPBACK}:{COREDNS_READY_PORT}
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa {{
        kubeconfig "{kubeconfig_of(state, "coredns")}"
        ttl 2
    }}
    cache 2
}}
"""


def _dns_objects() -> list[JsonObject]:
    in_kube_system = {"name": "kube-dns", "namespace": "kube-system"}
    ports = [
        {"name": "dns", "port": DNS_PORT, "protocol": "UDP"},
        {"name": "dns-tcp", "port": DNS_PORT, "protocol": "TCP"},
    ]
    role = "system:coredns"
    return [
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": role},
            "rules": [
                {
                    "apiGroups": [""],
                    "resources": ["services", "pods", "namespaces"],
                    "verbs": ["list", "watch"],
                },
                {
                    "apiGroups": ["discovery.k8s.io"],
                    "resources": ["endpointslices"],
                    "verbs": ["list", "watch"],
                },
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": role},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": role,
            },
            "subjects": [
                {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "User",
                    "name": COMPONENTS["coredns"][0],
                }
            ],
        },
        # Without a selector: its one endpoint is a process on the bridge, not a pod.
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": in_kube_system,
            "spec": {"clusterIP": DNS_SERVICE_ADDRESS, "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**in_kube_system, "labels": {"kubernetes.io/service-name": "kube-dns"}},
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": [{"addresses": [BRIDGE_ADDRESS], "conditions": {"ready": True}}],
        },
    ]


def requests_in(audit_log: Path) -> list[JsonObject]:
    """The requests in an audit log: `user.username`, `verb`, `objectRef`, `responseStatus.code`."""
    whole, _, _ = audit_log.read_text().rpartition("\n")  # the last line may be half written
    return [json.loads(line) for line in whole.splitlines()]


AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        # The cluster's own housekeeping would make nine lines of ten.
        {"level": "None", "nonResourceURLs": ["/readyz*", "/livez*", "/healthz*"]},
        {
            "level": "None",
            "userGroups": ["system:nodes"],
            "resources": [{"group": "coordination.k8s.io"}],
        },
        {"level": "Metadata"},
    ],
}
