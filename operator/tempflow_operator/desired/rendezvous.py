"""The headless Service that gives every pod of an attempt a host name."""

from tempflow_api.naming import MASTER_PORT, PROGRESS_PORT
from tempflow_operator.desired.attempt import AttemptOf, Manifest


def service(attempt: AttemptOf) -> Manifest:
    """One per attempt, under the attempt's name: a name that no earlier pod had is in no cache."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": attempt.metadata(),
        "spec": {
            "clusterIP": "None",
            "selector": attempt.ranks(),
            # The ranks have to find each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "ports": [
                {"name": "rendezvous", "port": MASTER_PORT, "protocol": "TCP"},
                {"name": "progress", "port": PROGRESS_PORT, "protocol": "TCP"},
            ],
        },
    }
