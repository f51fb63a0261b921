"""The ConfigMap with the resolved job, which the trainer reads with the same classes."""

from tempflow_api.v1alpha1 import JobSpec, ObjectMeta, TempFlowGRPOJob
from tempflow_operator.desired.attempt import AttemptOf, Manifest

JOB_FILE = "job.json"
# Where a pod sees the ConfigMap of spec.data.promptsConfigMap.
PROMPTS_DIR = "/etc/tempflow-prompts"


def config_map(attempt: AttemptOf) -> Manifest:
    """Immutable: an attempt sees one configuration from start to end, and kubelets need not watch
    for changes."""
    job = TempFlowGRPOJob(
        api_version="tempflow.dev/v1alpha1",
        kind="TempFlowGRPOJob",
        metadata=ObjectMeta(name=attempt.job, namespace=attempt.namespace),
        spec=_as_pods_see_it(attempt.spec),
    )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**attempt.metadata(), "name": attempt.config_name},
        "immutable": True,
        "data": {JOB_FILE: job.model_dump_json(by_alias=True, exclude_none=True, indent=1)},
    }


def _as_pods_see_it(spec: JobSpec) -> JobSpec:
    """With the path of prompts that a ConfigMap holds: the trainer knows files only."""
    if spec.data.prompts_config_map is None:
        return spec
    path = f"{PROMPTS_DIR}/{spec.data.prompts_file}"
    data = spec.data.model_copy(update={"prompts_file": path, "prompts_config_map": None})
    return spec.model_copy(update={"data": data})
