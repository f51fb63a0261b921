"""What a manifest becomes on its way to a cluster: the object to create, and its local prompts."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tempflow.cluster.connection import Raw
from tempflow.manifest import Manifest
from tempflow_api import naming
from tempflow_api.errors import Problem
from tempflow_api.v1alpha1 import TempFlowGRPOJob

# A ConfigMap may have 1 MiB with its metadata.
PROMPTS_BYTES = 900_000
_PROMPTS_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Prompts:
    """A local file of prompts, as a ConfigMap."""

    name: str
    key: str
    text: str

    def body(self, namespace: str | None, job_name: str) -> Raw:
        metadata: Raw = {"name": self.name}
        if namespace is not None:
            metadata["namespace"] = namespace
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                **metadata,
                "labels": {
                    "app.kubernetes.io/name": "tempflow",
                    "app.kubernetes.io/instance": job_name,
                    "app.kubernetes.io/component": "prompts",
                    naming.LABEL_JOB_NAME: job_name,
                },
            },
            # Attempts of one run read the same prompts.
            "immutable": True,
            "data": {self.key: self.text},
        }


@dataclass(frozen=True)
class Submission:
    """What is sent."""

    job: TempFlowGRPOJob
    prompts: Prompts | None

    def body(self, namespace: str | None) -> Raw:
        """Only what was written: the API server has the defaults, maybe newer ones."""
        raw: Raw = self.job.model_dump(
            mode="json", by_alias=True, exclude_unset=True, exclude={"status"}
        )
        if namespace is not None:
            raw["metadata"]["namespace"] = namespace
        return raw

    def bodies(self, namespace: str | None) -> list[Raw]:
        """All objects that are created, in their order."""
        job = self.body(namespace)
        if self.prompts is None:
            return [job]
        return [self.prompts.body(namespace, self.job.metadata.name), job]


def prepare(manifest: Manifest) -> Submission:
    """The submission of a valid manifest.

    Raises ManifestInvalid for what no pod could see: local paths but that of the prompts.
    """
    job = manifest.job
    prompts = None
    problems = list(_local_paths(manifest))
    path = _local_prompts(manifest)
    if path is not None:
        found = _read_prompts(path, job.metadata.name)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            prompts = found
    manifest.check(problems)
    if prompts is not None:
        change = {"prompts_file": prompts.key, "prompts_config_map": prompts.name}
        data = job.spec.data.model_copy(update=change)
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"data": data})})
    return Submission(job, prompts)


def _local_prompts(manifest: Manifest) -> Path | None:
    """The file to bring along. A path from the root that is not here is one inside the image."""
    data = manifest.job.spec.data
    given = data.prompts_file
    if given is None or "://" in given or data.prompts_config_map is not None:
        return None
    path = Path(given)
    return path if path.exists() or not Path(_as_written(manifest, given)).is_absolute() else None


def _as_written(manifest: Manifest, resolved: str) -> str:
    """The path before it was resolved against the manifest's folder."""
    node: object = manifest.source.value
    for key in ("spec", "data", "promptsFile"):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, str) else resolved


def _read_prompts(path: Path, job_name: str) -> Prompts | Problem:
    field = "spec.data.promptsFile"
    if path.is_dir():
        return Problem(
            field,
            f"{path} is a folder, which cannot go along: copy it to the store and write its "
            "s3:// address",
        )
    try:
        content = path.read_bytes()
        text = content.decode()
    except UnicodeDecodeError:
        return Problem(field, f"{path} is not text in UTF-8: save it as such")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return Problem(field, f"cannot read {path}: {reason}: write the prompts there, one a line")
    if path.suffix not in _PROMPTS_SUFFIXES:
        return Problem(field, f"got {path}: expects a name that ends in .txt or .jsonl")
    if len(content) > PROMPTS_BYTES:
        return Problem(
            field,
            f"{path} has {len(content):,} bytes, and {PROMPTS_BYTES:,} can be taken along: copy it "
            "to the store and write its s3:// address",
        )
    digest = hashlib.sha256(content).hexdigest()[:10]
    return Prompts(f"{job_name}-prompts-{digest}", f"prompts{path.suffix}", text)


def _local_paths(manifest: Manifest) -> Iterator[Problem]:
    spec = manifest.job.spec
    uri = spec.checkpoint.uri
    if uri is None or not uri.startswith("s3://"):
        yield Problem(
            "spec.checkpoint.uri",
            f"{'is missing' if uri is None else f'got {uri}'}: expects s3://bucket/prefix on a "
            "cluster, where pods do not outlive their disks (try it with --set "
            "spec.checkpoint.uri=s3://...)",
        )
    source = spec.model.source
    if _is_local_folder(source):
        yield Problem(
            "spec.model.source",
            f"got {source}, a folder of this machine, which pods do not see: copy it to the store "
            "and write its s3:// address, or name a model of the hub (owner/name)",
        )


def _is_local_folder(source: str) -> bool:
    if "://" in source or source.startswith("builtin:"):
        return False
    return source.startswith((".", "~")) or Path(source).is_dir()
