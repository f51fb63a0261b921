"""What the contract says about the field at a path: its siblings, its type in words."""

import types
import typing
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from tempflow.yaml_source import Path, spell
from tempflow_api.base import Section
from tempflow_api.v1alpha1 import TempFlowGRPOJob


def section_at(path: Path) -> type[Section] | None:
    """The block whose fields stand below ``path``; None where there are none."""
    kind: object = TempFlowGRPOJob
    for part in path:
        if isinstance(part, int):
            kind = _item(kind)
        else:
            field = _fields(kind).get(part)
            kind = _bare(field.annotation) if field else _item(kind)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def field_at(path: Path) -> FieldInfo | None:
    """The field at ``path``, if it is one of a block."""
    if not path or not isinstance(path[-1], str):
        return None
    return _fields(section_at(path[:-1])).get(path[-1])


def names_at(path: Path) -> list[str]:
    """The fields that the block at ``path`` may have, in the order of the contract."""
    return list(_fields(section_at(path)))


def homes_of(name: str) -> list[str]:
    """Paths of the blocks that have a field of this name."""
    return [spell(path) for path, model in _sections((), TempFlowGRPOJob) if name in _fields(model)]


def in_words(field: FieldInfo) -> str:
    """The type of a field as a user would say it."""
    kind = _bare(field.annotation)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"'{value}'" for value in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Section):
        needed = [name for name, inner in _fields(kind).items() if inner.is_required()]
        return f"a block with {', '.join(needed)}" if needed else "a block of fields"
    origin = typing.get_origin(kind) or kind
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        list: "a list",
        dict: "a mapping",
    }
    return words.get(origin, "a value") if isinstance(origin, type) else "a value"


def _fields(kind: object) -> dict[str, FieldInfo]:
    """The fields of a block by the name that stands in the manifest."""
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        return {}
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def _bare(annotation: object) -> object:
    """The type below ``Annotated`` and ``| None``."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        return _bare(inner[0])
    return annotation


def _item(kind: object) -> object:
    """The type of the entries of a list or the values of a mapping."""
    arguments = typing.get_args(kind)
    return _bare(arguments[-1]) if arguments else None


def _sections(path: Path, model: type[Section]) -> Iterator[tuple[Path, type[Section]]]:
    yield path, model
    for name, field in _fields(model).items():
        kind = _bare(field.annotation)
        where: Path = (*path, name)
        if typing.get_origin(kind) is list:
            kind, where = _item(kind), (*where, 0)
        # The operator writes status: nobody means a field of it.
        if isinstance(kind, type) and issubclass(kind, Section) and name != "status":
            yield from _sections(where, kind)
