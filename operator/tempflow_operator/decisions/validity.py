"""What a job has to have beyond its schema in order to run on a cluster."""

from tempflow_api.v1alpha1 import JobSpec
from tempflow_operator.decisions.observed import TrainingJob

_NO_IMAGE = (
    "spec.compute.image: missing, and the operator has no default. Name the trainer's image there, "
    "or have the operator started with one (trainerImage in the chart's values)"
)
_STORE = (
    "spec.checkpoint.uri: {found}: expected s3://bucket/prefix on a cluster, where pods do not "
    "outlive their disks"
)
_PROMPTS = (
    "spec.data.promptsFile: {found!r} is relative to a manifest that pods do not see: expected "
    "s3://, an absolute path inside the image, the prompts themselves in spec.data.prompts, or a "
    "ConfigMap, which tempflow submit makes of a local file"
)


def problems(job: TrainingJob, *, default_image: str | None) -> tuple[str, ...]:
    """Why the job cannot run as it is written, each with its remedy; empty when it can."""
    if job.spec is None or job.problems:
        return job.problems
    return (*_image(job.spec, default_image), *_paths(job.spec))


def _image(spec: JobSpec, default_image: str | None) -> tuple[str, ...]:
    return () if spec.compute.image or default_image else (_NO_IMAGE,)


def _paths(spec: JobSpec) -> tuple[str, ...]:
    found = []
    uri = spec.checkpoint.uri
    if uri is None or not uri.startswith("s3://"):
        found.append(_STORE.format(found="missing" if uri is None else repr(uri)))
    prompts = spec.data.prompts_file
    in_config_map = spec.data.prompts_config_map is not None
    if prompts is not None and not in_config_map and not prompts.startswith(("s3://", "/")):
        found.append(_PROMPTS.format(found=prompts))
    return tuple(found)
