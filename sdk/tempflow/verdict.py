"""The verdict on a manifest, as lines or as JSON."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import yaml

from tempflow.manifest import Manifest
from tempflow_api.errors import ManifestInvalid
from tempflow_api.v1alpha1 import TempFlowGRPOJob


@dataclass(frozen=True)
class Verdict:
    """What reading a file came to."""

    file: str
    job: TempFlowGRPOJob | None = None
    error: ManifestInvalid | None = None

    @property
    def valid(self) -> bool:
        return self.error is None

    def lines(self) -> list[str]:
        """For people."""
        if self.error:
            return self.error.lines()
        return [f"{self.file}: valid, job {self.job.metadata.name if self.job else ''}"]


def judge(
    read: Callable[[str, Sequence[str]], Manifest], file: str, overrides: Sequence[str]
) -> Verdict:
    """Read ``file``; a problem becomes part of the verdict."""
    try:
        return Verdict(file, job=read(file, overrides).job)
    except ManifestInvalid as error:
        return Verdict(file, error=error)


def as_yaml(verdicts: Iterable[Verdict]) -> str:
    """The valid jobs, overrides applied, without the defaults: what ``kubectl apply`` takes."""
    documents = [
        v.job.model_dump(mode="json", by_alias=True, exclude_unset=True) for v in verdicts if v.job
    ]
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)


def as_json(verdicts: Iterable[Verdict]) -> str:
    """For programs: a list with one object a file."""
    return json.dumps(
        [
            {
                "file": verdict.file,
                "valid": verdict.valid,
                "job": verdict.job.metadata.name if verdict.job else None,
                "problems": [
                    {"line": p.line, "path": p.path, "message": p.message}
                    for p in (verdict.error.problems if verdict.error else ())
                ],
            }
            for verdict in verdicts
        ],
        indent=2,
    )
