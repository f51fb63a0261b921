"""The headless Service that gives rank 0 of an attempt its host name."""

from tempflow_api.naming import MASTER_PORT, POD_INDEX, PROGRESS_PORT
from tempflow_operator.desired.attempt import AttemptOf, Manifest


def service(attempt: AttemptOf) -> Manifest:
    """One per attempt, under the attempt's name: a name that no earlier pod had is in no cache.

    All ranks meet at rank 0 and learn one another's addresses there. With all pods behind it, its
    endpoints would be written anew for each pod that starts.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": attempt.metadata(),
        "spec": {
            "clusterIP": "None",
            "selector": {**attempt.ranks(), POD_INDEX: "0"},
            # The ranks have to find each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "ports": [
                {"name": "rendezvous", "port": MASTER_PORT, "protocol": "TCP"},
                {"name": "progress", "port": PROGRESS_PORT, "protocol": "TCP"},
            ],
        },
    }
