"""A manifest: YAML and ``--set`` overrides -> a typed job, or every problem with its line."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tempflow.complaints import complaint, cut_short, named_value
from tempflow.involved import involved
from tempflow.yaml_source import Path as FieldPath
from tempflow.yaml_source import Source, override, parse, spell
from tempflow_api.errors import ManifestInvalid, Problem
from tempflow_api.rules import RULES, Rule
from tempflow_api.v1alpha1 import JobSpec, TempFlowGRPOJob

STDIN = "-"

# What the API server adds to an object: accepted, so that ``kubectl get -o yaml`` can be read.
_WRITTEN_BY_SERVER = frozenset(
    {
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generation",
        "managedFields",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    }
)


@dataclass(frozen=True)
class Manifest:
    """A valid job, and where its fields stand."""

    job: TempFlowGRPOJob
    name: str
    """Of the file, as the user wrote it."""
    source: Source = field(default_factory=Source)

    def check(self, problems: Iterable[Problem]) -> None:
        """Raise ManifestInvalid, with lines, if there is any problem."""
        located = [
            Problem(p.path, p.message, self.source.nearest(_split(p.path)).line) for p in problems
        ]
        if located:
            raise ManifestInvalid(self.name, located)


def read(file: str, overrides: Sequence[str] = ()) -> Manifest:
    """The manifest in ``file``, or in standard input if that is ``-``.

    A relative ``promptsFile`` is resolved against the folder of the file. Raises ManifestInvalid.
    """
    if file == STDIN:
        return parse_text(sys.stdin.read(), "stdin", overrides, folder=Path.cwd())
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestInvalid(file, [Problem("manifest", "is not text in UTF-8")]) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ManifestInvalid(file, [Problem("manifest", f"cannot be read: {reason}")]) from error
    return parse_text(text, file, overrides, folder=path.resolve().parent)


def parse_text(
    text: str, name: str, overrides: Sequence[str] = (), *, folder: Path | None = None
) -> Manifest:
    """The manifest in ``text``; ``name`` stands for it in messages. Raises ManifestInvalid."""
    source = parse(text)
    if source.value is None:
        raise _invalid(name, source)
    for expression in overrides:
        override(source, expression)
    if not isinstance(source.value, dict):
        source.complain((), "expects a mapping with apiVersion, kind, metadata and spec")
        raise _invalid(name, source)
    job = _validate(source, _without_server_fields(source.value))
    if job is None or source.problems:
        raise _invalid(name, source)
    return Manifest(_with_prompts_file(job, folder), name, source)


def _validate(source: Source, data: dict[str, object]) -> TempFlowGRPOJob | None:
    """The job in ``data``, None if a field is wrong; all complaints go to ``source``."""
    job: TempFlowGRPOJob | None = None
    errors = []
    try:
        job = TempFlowGRPOJob.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as refusal:
        errors = refusal.errors(include_url=False)
    known = {problem.path for problem in source.problems}
    for error in errors:
        path = _field_path(error["loc"])
        spot = source.nearest(path)
        if spell(path) not in known:
            source.complain(path, complaint(error, path, spot) + _origin(source, path))
    wrong = {error["loc"][1] for error in errors if len(error["loc"]) > 1}
    for rule, spec in _broken(data.get("spec"), wrong):
        source.complain(_split(rule.path), f"{rule.message}; got {_values(rule, spec, source)}")
    return job


def _values(rule: Rule, spec: JobSpec, source: Source) -> str:
    """What the fields of a rule hold, named as seen from the field at which it is shown."""
    home = rule.path.rpartition(".")[0]
    shown = []
    for path, value in involved(rule, spec).items():
        name = spell(path).removeprefix(f"{home}.").removeprefix("spec.")
        shown.append(named_value(name, value, source.spots.get(path)) + _origin(source, path))
    return cut_short(shown)


def _broken(spec: object, wrong: set[int | str]) -> list[tuple[Rule, JobSpec]]:
    """The rules that ``spec`` breaks, as far as its valid sections tell, which come with them.

    A rule is judged only if every section that it reads is valid, so that one mistake does not
    bring a second message about what was meant.
    """
    if not isinstance(spec, Mapping):
        return []
    sections: dict[str, Any] = {}
    for name, info in JobSpec.model_fields.items():
        alias = info.alias or name
        if alias in wrong:
            continue
        if alias in spec:
            kind: Any = info.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(kind)
            sections[name] = adapter.validate_python(spec[alias], by_alias=True, by_name=False)
        else:
            sections[name] = info.get_default(call_default_factory=True)
    partial = JobSpec.model_construct(**sections)
    judged = (rule for rule in RULES if not _reads(rule) & wrong)
    return [(rule, partial) for rule in judged if not rule.holds(partial)]


def _reads(rule: Rule) -> set[str]:
    """Sections of the spec that a rule looks at; its expression names them."""
    return set(re.findall(r"self\.(\w+)", rule.cel))


def _without_server_fields(document: dict[str, object]) -> dict[str, object]:
    kept = {key: value for key, value in document.items() if key != "status"}
    metadata = kept.get("metadata")
    if isinstance(metadata, dict):
        kept["metadata"] = {k: v for k, v in metadata.items() if k not in _WRITTEN_BY_SERVER}
    return kept


def _with_prompts_file(job: TempFlowGRPOJob, folder: Path | None) -> TempFlowGRPOJob:
    given = job.spec.data.prompts_file
    if job.spec.data.prompts_config_map is not None:
        return job  # there it is a key, not a path
    if given is None or folder is None or "://" in given or Path(given).is_absolute():
        return job
    data = job.spec.data.model_copy(update={"prompts_file": str((folder / given).resolve())})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"data": data})})


def _invalid(name: str, source: Source) -> ManifestInvalid:
    """What has been found, in the order of the lines."""
    ordered = sorted(source.problems, key=lambda problem: problem.line or 0)
    return ManifestInvalid(name, list(dict.fromkeys(ordered)))


def _origin(source: Source, path: FieldPath) -> str:
    """A note for a value that is not in the file."""
    return " (from --set)" if path in source.spots and source.spots[path].line is None else ""


def _field_path(location: tuple[int | str, ...]) -> FieldPath:
    """A location of pydantic's, without its marker for the key of a mapping."""
    return tuple(part for part in location if part != "[key]")


def _split(path: str) -> FieldPath:
    """The parts of a spelled path of the contract."""
    parts: list[str | int] = []
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        parts.append(int(index) if index else name)
    return tuple(parts)
