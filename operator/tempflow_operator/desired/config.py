"""The ConfigMap with the resolved job, which the trainer reads with the same classes."""

from tempflow_api.v1alpha1 import ObjectMeta, TempFlowGRPOJob
from tempflow_operator.desired.attempt import AttemptOf, Manifest

JOB_FILE = "job.json"


def config_map(attempt: AttemptOf) -> Manifest:
    """Immutable: an attempt sees one configuration from start to end, and kubelets need not watch
    for changes."""
    job = TempFlowGRPOJob(
        api_version="tempflow.dev/v1alpha1",
        kind="TempFlowGRPOJob",
        metadata=ObjectMeta(name=attempt.job, namespace=attempt.namespace),
        spec=attempt.spec,
    )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**attempt.metadata(), "name": attempt.config_name},
        "immutable": True,
        "data": {JOB_FILE: job.model_dump_json(by_alias=True, exclude_none=True, indent=1)},
    }
