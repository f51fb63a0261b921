"""How the pods of an attempt reach one another: NCCL's variables, and who may talk to whom."""

from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from tempflow_api.naming import PROGRESS_PORT
from tempflow_api.pods import Network
from tempflow_api.v1alpha1 import JobSpec
from tempflow_operator.desired.attempt import AttemptOf, Manifest

# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html, and for EFA
# https://github.com/aws/aws-ofi-nccl.
_PRESETS: dict[str, dict[str, str]] = {
    "default": {},
    "tcp": {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"},
    # Twice the default's patience with a fabric that re-routes: 4.1 us * 2^22 is 17 s a try.
    "ib": {"NCCL_NET": "IB", "NCCL_IB_DISABLE": "0", "NCCL_IB_TIMEOUT": "22"},
    # The plugin of the image provides the network; without it NCCL says that there is none.
    "efa": {"NCCL_NET": "AWS Libfabric", "FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"},
}
# As the chart labels the operator's pods.
_OPERATOR_LABELS = {
    "app.kubernetes.io/part-of": "tempflow",
    "app.kubernetes.io/component": "operator",
}


def variables(network: Network) -> dict[str, str]:
    """Of NCCL, and of gloo, which carries what the ranks tell one another about CPU tensors."""
    values = dict(_PRESETS[network.preset])
    if network.preset != "default":
        values["NCCL_DEBUG"] = "WARN"
    if network.interface is not None:
        values["NCCL_SOCKET_IFNAME"] = network.interface
        if network.interface[0] not in "^=":  # gloo takes one name and no patterns
            values["GLOO_SOCKET_IFNAME"] = network.interface.split(",", maxsplit=1)[0]
    return values


def network_policy(attempt: AttemptOf) -> Manifest:
    """The pods of the attempt talk to one another on every port: NCCL opens its own."""
    pods = {"podSelector": {"matchLabels": attempt.selector()}}
    # The operator is in a namespace that the job does not know.
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": _OPERATOR_LABELS}}
    dns = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    outside = sorted({443, *_ports_asked(attempt.spec)})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": attempt.metadata(),
        "spec": {
            "podSelector": {"matchLabels": attempt.selector()},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [pods]},
                {"from": [operator], "ports": [{"port": PROGRESS_PORT, "protocol": "TCP"}]},
            ],
            "egress": [
                {"to": [pods]},
                {"ports": dns},
                {"ports": [{"port": port, "protocol": "TCP"} for port in outside]},
            ],
        },
    }


def _ports_asked(spec: JobSpec) -> Iterator[int]:
    """Of the store, of rewards that are served elsewhere, and of whatever server the parameters of
    a reward or a variable name: a proxy, a mirror of the hub."""
    texts = [spec.checkpoint.endpoint_url or ""]
    texts += [variable.value for variable in spec.compute.pod_template.env]
    for reward in spec.rewards:
        texts += reward.service.endpoints if reward.service is not None else []
        texts += reward.parameters.values()
    words = [word.strip() for text in texts for word in text.split(",")]
    for word in [word for word in words if word.startswith(("http://", "https://"))]:
        with suppress(ValueError):  # of such texts nobody has said that they are addresses
            address = urlsplit(word)
            yield address.port or (80 if address.scheme == "http" else 443)
