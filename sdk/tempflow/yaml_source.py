"""YAML text -> plain values that remember where in the text they stand.

The dialect is YAML 1.2: ``3e-4`` is a number, ``yes`` and ``on`` are text, and a number with a
leading zero is no number (YAML 1.1, which kubectl reads, would take it as octal). Duplicate keys,
tags and infinite numbers are problems. Anchors, aliases and merge keys work.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from tempflow_api.errors import Problem

_TAG = "tag:yaml.org,2002:"

Path = tuple[str | int, ...]
"""Keys and positions from the root to a value."""

# More values than any job has; stops an alias bomb before memory does.
_MAX_VALUES = 20_000

_PLAIN_KEY = re.compile(r"^[A-Za-z_<][\w<-]*$")


class _Loader(yaml.SafeLoader):
    """A parser with the scalar types of YAML 1.2's core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute


_EXPONENT = "[eE][-+]?[0-9]+"
_FRACTION = r"(?:[0-9]+\.[0-9]*|\.[0-9]+)"
_FLOAT = (
    rf"^(?:[-+]?(?:{_FRACTION}(?:{_EXPONENT})?|[0-9]+{_EXPONENT}|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN))$"
)

for _name, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(_pattern), _first)


@dataclass(frozen=True)
class Spot:
    """Where a value stands and how it is spelled."""

    line: int | None
    """From 1; None for a value that ``--set`` gave."""
    text: str | None = None
    """As written, without quotes, for a scalar."""
    quoted: bool = False


@dataclass
class Source:
    """A parsed text: its value, where each part stands, and what is wrong with it so far."""

    value: object = None
    spots: dict[Path, Spot] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def nearest(self, path: Path) -> Spot:
        """The spot of ``path``, or of its nearest parent that is in the text."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.spots:
                return self.spots[path[:end]]
        return Spot(line=None)

    def complain(self, path: Path, message: str, line: int | None = None) -> None:
        """Note a problem with the value at ``path``."""
        self.problems.append(Problem(spell(path), message, line or self.nearest(path).line))


def spell(path: Path) -> str:
    """``spec.rewards[0].weight``; a key that is no plain word stands in brackets."""
    spelled = ""
    for part in path:
        if isinstance(part, int):
            spelled += f"[{part}]"
        elif _PLAIN_KEY.match(part):
            spelled += f".{part}"
        else:
            spelled += f"['{part}']"
    return spelled.removeprefix(".") or "manifest"


def parse(text: str) -> Source:
    """Parse one document; problems are collected, never raised."""
    source = Source()
    try:
        documents = [n for n in yaml.compose_all(text, _Loader) if not _is_empty(n)]
    except yaml.YAMLError as error:
        line, message = _syntax(error, text)
        source.complain((), message, line)
        return source
    except RecursionError:
        source.complain((), "is nested too deeply")
        return source
    if not documents:
        source.complain(
            (), "is empty: expects a job; 'tempflow init --preset digits' writes one to start from"
        )
        return source
    if len(documents) > 1:
        source.complain(
            (),
            "a second document starts here: one file describes one job; put each into a file of "
            "its own",
            documents[1].start_mark.line + 1,
        )
        return source
    source.value = _Conversion(source).convert(documents[0], (), documents[0], ())
    return source


def _is_empty(node: yaml.Node | None) -> bool:
    return node is None or (node.tag == f"{_TAG}null" and node.value == "")


def _syntax(error: yaml.YAMLError, text: str) -> tuple[int | None, str]:
    """Line and message of what the parser did not understand."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        problem = error.problem or "cannot be parsed"
        if r"'\t'" in problem:
            return line, "a tab indents this line: YAML takes spaces only"
        context = f" ({error.context})" if error.context else ""
        return line, f"is not valid YAML: {problem}{context}"
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"has a character that YAML does not allow: {text[error.position]!r}"
    return None, f"is not valid YAML: {error}"


class _Conversion:
    """One pass over the nodes of a document, filling ``source``."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.count = 0

    def convert(
        self, node: yaml.Node, path: Path, key: yaml.Node, parents: tuple[yaml.Node, ...]
    ) -> object:
        """The plain value of ``node``; ``key`` is the node at which its field begins."""
        line = key.start_mark.line + 1
        self.source.spots[path] = Spot(line)
        self.count += 1
        if any(node is parent for parent in parents):
            self.source.complain(path, f"contains itself: the alias in line {line} is circular")
            return None
        if self.count > _MAX_VALUES:
            if self.count == _MAX_VALUES + 1:
                self.source.complain((), f"has more than {_MAX_VALUES} values")
            return None
        inside = (*parents, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, inside)
        if isinstance(node, yaml.SequenceNode):
            return [
                self.convert(item, (*path, index), item, inside)
                for index, item in enumerate(node.value)
            ]
        if not isinstance(node, yaml.ScalarNode):
            raise TypeError(f"a YAML node of kind {type(node).__name__}")
        quoted = node.style in ("'", '"', "|", ">")
        self.source.spots[path] = Spot(line, node.value, quoted)
        return self._scalar(node, path)

    def _mapping(
        self, node: yaml.MappingNode, path: Path, inside: tuple[yaml.Node, ...]
    ) -> dict[str, object]:
        values: dict[str, object] = {}
        merged: dict[str, object] = {}
        first_line: dict[str, int] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if key.tag != f"{_TAG}str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                self.source.complain(
                    path, f"has the key {shown or 'nothing'}: expects text, in quotes", line
                )
            elif key.value == "<<" and key.style is None:
                for part in _merge_parts(item):
                    value = self.convert(part, path, key, inside)
                    merged = {**(value if isinstance(value, dict) else {}), **merged}
            elif key.value in first_line:
                self.source.complain(
                    (*path, key.value),
                    f"is given twice, first in line {first_line[key.value]}: keep one",
                    line,
                )
            else:
                first_line[key.value] = line
                values[key.value] = self.convert(item, (*path, key.value), key, inside)
        return {**merged, **values}

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> object:
        text = node.value
        match node.tag.removeprefix(_TAG):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text, 0)
            case "float":
                value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                if not math.isfinite(value):
                    self.source.complain(path, f"got {text}: expects a finite number")
                    return 0.0
                return value
        self.source.complain(path, f"has the tag {node.tag}: tags are not supported, remove it")
        return None


def _merge_parts(node: yaml.Node) -> Iterator[yaml.Node]:
    """The mappings that a merge key names, the strongest first."""
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    else:
        yield node


_STEP = re.compile(r"\.?([^.\[\]=]+)|\[(\d+)\]")


def override(source: Source, expression: str) -> None:
    """Apply one ``path=value`` to the parsed text; the value is read as YAML."""
    dotted, equals, text = expression.partition("=")
    steps = _STEP.findall(dotted)
    if not equals or not steps or "".join(_STEP.sub("", dotted)):
        source.problems.append(
            Problem(
                "--set",
                f"got '{expression}': expects path=value, for instance spec.sampling.steps=20",
            )
        )
        return
    path: Path = tuple(int(index) if index else name for name, index in steps)
    given = parse(text) if text.strip() else Source()
    if given.problems:
        source.problems += [
            Problem(spell(path), f"{problem.message} (from --set)") for problem in given.problems
        ]
        return
    if _put(source, path, given.value):
        for known in [p for p in source.spots if p[: len(path)] == path]:
            del source.spots[known]
        for below, spot in given.spots.items():
            source.spots[path + below] = Spot(None, spot.text, spot.quoted)
        for end in range(1, len(path) + 1):
            source.spots.setdefault(path[:end], Spot(None))


def _put(source: Source, path: Path, value: object) -> bool:
    """Store ``value`` at ``path``, making the mappings on the way; False after a complaint."""
    if source.value is None:
        source.value = {}
    holder = source.value
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(holder, dict) and isinstance(part, str):
            if last:
                holder[part] = value
            elif holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
        elif isinstance(holder, list) and isinstance(part, int) and part <= len(holder):
            if part == len(holder):
                holder.append({})
            if last:
                holder[part] = value
            holder = holder[part]
        else:
            parent = spell(path[:depth])
            length = len(holder) if isinstance(holder, list) else None
            reason = "is no block of fields" if length is None else f"has the length {length}"
            if length is not None and isinstance(part, str):
                reason = f"is a list: write {parent}[0] for its first entry"
            source.complain(path[: depth + 1], f"cannot be set: {parent} {reason} (from --set)")
            return False
    return True
