"""The verdict on a manifest, as lines or as JSON."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tempflow.manifest import Manifest
from tempflow_api.errors import ManifestInvalid


@dataclass(frozen=True)
class Verdict:
    """What reading a file came to."""

    file: str
    job_name: str | None = None
    error: ManifestInvalid | None = None

    @property
    def valid(self) -> bool:
        return self.error is None

    def lines(self) -> list[str]:
        """For people."""
        return self.error.lines() if self.error else [f"{self.file}: valid, job {self.job_name}"]


def judge(
    read: Callable[[str, Sequence[str]], Manifest], file: str, overrides: Sequence[str]
) -> Verdict:
    """Read ``file``; a problem becomes part of the verdict."""
    try:
        return Verdict(file, job_name=read(file, overrides).job.metadata.name)
    except ManifestInvalid as error:
        return Verdict(file, error=error)


def as_json(verdicts: Iterable[Verdict]) -> str:
    """For programs: a list with one object a file."""
    return json.dumps(
        [
            {
                "file": verdict.file,
                "valid": verdict.valid,
                "job": verdict.job_name,
                "problems": [
                    {"line": p.line, "path": p.path, "message": p.message}
                    for p in (verdict.error.problems if verdict.error else ())
                ],
            }
            for verdict in verdicts
        ],
        indent=2,
    )
