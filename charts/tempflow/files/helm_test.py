"""What `helm test` runs in a pod: jobs are checked by the API server, and an operator leads."""

import os
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

NAMESPACE = os.environ["POD_NAMESPACE"]
LEASE = os.environ["TEMPFLOW_LEASE_NAME"]
PATIENCE_SECONDS = 60
FRESH = timedelta(seconds=60)


def job(rewards: list[dict[str, str]]) -> dict[str, Any]:
    """A job that is complete but for its rewards, perhaps."""
    return {
        "apiVersion": "tempflow.dev/v1alpha1",
        "kind": "TempFlowGRPOJob",
        "metadata": {"name": "helm-test"},
        "spec": {
            "model": {"family": "digits", "source": "builtin:digits", "tuning": "full"},
            "data": {"prompts": ["a three"]},
            "sampling": {"width": 14, "height": 14},
            "rewards": rewards,
            "checkpoint": {"uri": "s3://helm-test/runs"},
            "compute": {"device": "cpu"},
        },
    }


def dry_run(body: dict[str, Any]) -> tuple[int, str]:
    """The API server's verdict on a job, which it does not store."""
    try:
        client.CustomObjectsApi().create_namespaced_custom_object(
            "tempflow.dev", "v1alpha1", NAMESPACE, "tempflowgrpojobs", body, dry_run="All"
        )
    except ApiException as refusal:
        return int(refusal.status or 0), str(refusal.body)
    return 201, "taken"


def leader() -> str | None:
    """Which copy of the operator holds the Lease, when it renewed it lately."""
    try:
        lease: Any = client.CoordinationV1Api().read_namespaced_lease(LEASE, NAMESPACE)
    except ApiException as refusal:
        if refusal.status == 404:
            return None  # no copy has come so far
        raise
    holder, renewed = lease.spec.holder_identity, lease.spec.renew_time
    return str(holder) if holder and renewed and datetime.now(UTC) - renewed < FRESH else None


def main() -> str:
    """What was found; ends with exit code 1 and the reason when something is wrong."""
    config.load_incluster_config()  # type: ignore[no-untyped-call]
    code, answer = dry_run(job([{"name": "digit-log-probability"}]))
    if code != 201:
        sys.exit(f"FAILED: the API server refuses a valid job: HTTP {code}: {answer}")
    code, answer = dry_run(job([]))
    if code != 422:
        sys.exit(f"FAILED: the API server does not refuse a job without rewards: HTTP {code}")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (holder := leader()) is None:
        if time.monotonic() > deadline:
            sys.exit(f"FAILED: no operator holds the Lease {NAMESPACE}/{LEASE}")
        time.sleep(1)
    return f"OK: jobs are checked, and {holder} leads"


if __name__ == "__main__":
    sys.stdout.write(main() + "\n")
