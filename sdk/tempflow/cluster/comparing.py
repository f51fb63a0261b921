"""In which fields two specifications of a job differ."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tempflow_api.rules import changed_fields, mutability_of
from tempflow_api.v1alpha1 import JobSpec


@dataclass(frozen=True)
class Change:
    """One field."""

    path: str
    now: Any
    wanted: Any
    may_change: str
    """When the API server accepts it."""

    def as_object(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        return f"{self.path}: {_short(self.now)} -> {_short(self.wanted)} ({self.may_change})"


def differences(now: JobSpec, wanted: JobSpec) -> list[Change]:
    """By path; defaults count as written."""
    old, new = (spec.model_dump(mode="json", by_alias=True) for spec in (now, wanted))
    return [
        Change(path, _at(old, path), _at(new, path), str(mutability_of(path)))
        for path in changed_fields(now, wanted)
    ]


def _at(spec: Mapping[str, Any], path: str) -> Any:
    value: Any = {"spec": spec}
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> str:
    text = repr(value) if value is not None else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."
