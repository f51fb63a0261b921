"""The fields that a rule looks at, with their values: what a message about it has to show."""

import re
from collections.abc import Iterator
from typing import Any

from tempflow.yaml_source import Path
from tempflow_api.base import Section
from tempflow_api.rules import Rule
from tempflow_api.v1alpha1 import JobSpec

_PATH = re.compile(r"\bself((?:\.\w+)+)")
_OVER_ENTRIES = r"\bself{path}\.(?:all|exists)\((\w+),"


def involved(rule: Rule, spec: JobSpec) -> dict[Path, Any]:
    """Values by path, that at which the error is shown first; of a list, those of its entries.

    A block is only there where none of its fields is. The rule's expression names the fields, with
    methods of CEL behind some of them, which no block knows.
    """
    found: dict[Path, Any] = {}
    for dotted in dict.fromkeys(_PATH.findall(rule.cel)):
        path, value = _resolved(spec, dotted, ("spec",))
        if isinstance(value, list) and value and isinstance(value[0], Section):
            found.update(_of_entries(rule.cel, path, value))
        else:
            found[path] = value
    shown_at = tuple(rule.path.split("."))
    ordered = sorted(found, key=lambda path: path != shown_at)
    return {path: found[path] for path in ordered if not _is_in(path, found)}


def _of_entries(cel: str, path: Path, entries: list[Section]) -> Iterator[tuple[Path, Any]]:
    dotted = "".join(rf"\.{part}" for part in path[1:])
    variables = set(re.findall(_OVER_ENTRIES.format(path=dotted), cel))
    fields = [d for v in sorted(variables) for d in re.findall(rf"\b{v}((?:\.\w+)+)", cel)]
    for position, entry in enumerate(entries):
        values = [_resolved(entry, field, (*path, position)) for field in dict.fromkeys(fields)]
        # What is not there only counts where nothing is.
        yield from [found for found in values if found[1] is not None] or values


def _resolved(block: Section, dotted: str, path: Path) -> tuple[Path, Any]:
    """As far as ``dotted`` names fields below ``block``, which stands at ``path``."""
    value: Any = block
    for part in dotted.removeprefix(".").split("."):
        names = {info.alias or name: name for name, info in type(value).model_fields.items()}
        if part not in names:
            break
        path, value = (*path, part), getattr(value, names[part])
        if not isinstance(value, Section):
            break
    return path, value


def _is_in(path: Path, others: dict[Path, Any]) -> bool:
    """Whether one of ``others`` lies below ``path``."""
    return any(len(other) > len(path) and other[: len(path)] == path for other in others)
