"""What is wrong with a field -> one sentence: value, expectation, remedy, nearest valid name."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

from tempflow.fields import field_at, homes_of, in_words, names_at
from tempflow.yaml_source import Path, Spot
from tempflow_api.base import Section

_PATTERNS = {
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": (
        "lower-case letters, digits and '-', beginning and ending with a letter or digit"
    ),
    r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$": "a quantity such as 500m, 4 or 16Gi",
    r"^(s3://[a-z0-9][a-z0-9.-]+(/.*)?|file://.+|[^:]+)$": (
        "s3://bucket/prefix, file:///folder or a path"
    ),
    r"^[A-Za-z0-9_][\w.-]*(:\w+)?$": "the name of a reward, or module:Class",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "the name of an environment variable",
    r"^/[^:]+$": "an absolute path without ':'",
    r"^[a-z0-9.-]+/[A-Za-z0-9_.-]+$": "a resource such as nvidia.com/gpu",
    r"^[a-z0-9.-]+/[A-Za-z0-9_./-]+$": "a domain and a name, such as kueue.x-k8s.io/multikueue",
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$": (
        "lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit"
    ),
    r"^[\^=]?[A-Za-z0-9_.,-]+$": "names of network interfaces, as NCCL_SOCKET_IFNAME takes them",
    r"^https?://[^\s/?#]+(/[^\s?#]*)?$": "an address such as http://rewards:8090, without a query",
    r"^s3://[a-z0-9][a-z0-9.-]+/.+\.whl$": "an address such as s3://bucket/name-1.0-py3-none-any.whl",
    r"^[0-9a-f]{64}$": "the 64 digits that sha256sum prints",
    r"^https?://.+$": "an address that begins with http:// or https://",
}
"""The patterns of the contract in words."""

_KINDS = {
    "bool_type": "true or false",
    "list_type": "a list; begin each entry with '- '",
    "dict_type": "a mapping",
    "model_type": "a block of fields",
}

_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}

_LENGTHS = {
    "string_too_short": ("at least", "min_length"),
    "string_too_long": ("at most", "max_length"),
    "too_short": ("at least", "min_length"),
    "too_long": ("at most", "max_length"),
}

_INTEGRAL = re.compile(r"^[-+]?[0-9]+$")
_NUMBER = re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$")
_LONGEST_SHOWN = 60
_MOST_SHOWN = 8


def complaint(error: ErrorDetails, path: Path, spot: Spot) -> str:
    """The sentence for one error of pydantic's at ``path``, which is spelled as in ``spot``."""
    given: Any = error["input"]
    context: dict[str, Any] = error.get("ctx") or {}
    kind = error["type"]
    if kind == "missing":
        field = field_at(path)
        return f"is missing: expects {in_words(field) if field else 'a value'}"
    if kind == "extra_forbidden":
        return _unknown_field(path)
    if given is None:
        return _empty(path)
    if kind == "literal_error":
        return _not_a_choice(given, path)
    if kind in ("int_type", "float_type", "int_from_float"):
        return _not_a_number(given, spot, whole=kind != "float_type")
    if kind == "string_type":
        return _not_text(given, spot)
    if kind == "string_pattern_mismatch":
        return _wrong_form(given, context["pattern"])
    if kind in _KINDS:
        return f"got {shown(given, with_kind=True)}: expects {_KINDS[kind]}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"got {shown(given, spot)}: expects {words} {shown(context[bound])}"
    if kind in _LENGTHS:
        words, bound = _LENGTHS[kind]
        return f"has {_length(given)}: expects {words} {context[bound]}"
    return f"got {shown(given)}: {error['msg']}"


def named_value(name: str, value: object, spot: Spot | None) -> str:
    """A field and what it holds: its value, its entries, or that there is none."""
    if value is None:
        return f"no {name}"
    if isinstance(value, Section):
        return name
    if isinstance(value, (list, dict)):
        return f"{name} [{cut_short([shown(entry) for entry in value])}]"
    return f"{name} {shown(value, spot)}"


def cut_short(words: Sequence[str]) -> str:
    """The first of them; dots stand for the others."""
    return ", ".join([*words[:_MOST_SHOWN], *(["..."] if len(words) > _MOST_SHOWN else [])])


def nearest(name: str, valid: Sequence[str], cutoff: float = 0.6) -> str:
    """``; did you mean 'x'?``, or nothing where no valid name is near."""
    by_folded = {_folded(word): word for word in valid}
    found = difflib.get_close_matches(_folded(name), list(by_folded), n=1, cutoff=cutoff)
    return f"; did you mean '{by_folded[found[0]]}'?" if found else ""


def _folded(name: str) -> str:
    """Without case, dash and underscore, which are what people mix up."""
    return re.sub(r"[-_]", "", name).lower()


def _unknown_field(path: Path) -> str:
    name, valid = str(path[-1]), names_at(path[:-1])
    homes = homes_of(name)
    # A name that is right elsewhere is a misplaced one, unless it is a slip of the pen here.
    if hint := nearest(name, valid, cutoff=0.8 if homes else 0.6):
        return f"unknown field{hint}"
    if homes:
        return f"unknown field; '{name}' belongs to {' or '.join(homes)}"
    return f"unknown field; valid here: {', '.join(valid)}"


def _empty(path: Path) -> str:
    field = field_at(path)
    if field is None:
        return "got nothing: expects a value"
    remedy = "" if field.is_required() else "; remove the key to take the default"
    return f"got nothing: expects {in_words(field)}{remedy}"


def _not_a_choice(given: object, path: Path) -> str:
    field = field_at(path)
    expected = in_words(field) if field else "another value"
    valid = re.findall(r"'([^']*)'", expected)
    hint = nearest(given, valid) if isinstance(given, str) and len(valid) > 1 else ""
    return f"got {shown(given)}: expects {expected}{hint}"


def _not_a_number(given: object, spot: Spot, *, whole: bool) -> str:
    expected = "a whole number" if whole else "a number"
    if isinstance(given, float):
        remedy = f"; write {int(given)}" if given.is_integer() else ""
        return f"got {shown(given, spot)}: expects {expected}{remedy}"
    if not isinstance(given, str):
        return f"got {shown(given, spot)}: expects {expected}"
    without = given.replace("_", "")
    if not (_INTEGRAL if whole else _NUMBER).match(without):
        return f"got {shown(given)} (text): expects {expected}"
    if spot.quoted:
        return f"got {shown(given)} (text): remove the quotes"
    if "_" in given:
        return f"got {given} (text): write it without '_'"
    return f"got {given}: write {int(given)}; with leading zeros it is octal to some readers"


def _not_text(given: object, spot: Spot) -> str:
    if isinstance(given, (dict, list)):
        return f"got {shown(given)}: expects text"
    text = spot.text if spot.text is not None else str(given)
    kind = "a boolean" if isinstance(given, bool) else "a number"
    return f'got {text} ({kind}): expects text, put it in quotes: "{text}"'


def _wrong_form(given: str, pattern: str) -> str:
    expected = _PATTERNS.get(pattern, f"the form {pattern}")
    hint = ""
    if pattern.startswith("^[a-z0-9](["):
        valid = re.sub(r"[^a-z0-9]+", "-", given.lower()).strip("-")
        hint = f"; did you mean '{valid}'?" if valid else ""
    return f"got {shown(given)}: expects {expected}{hint}"


def _length(value: str | list[object] | dict[str, object]) -> str:
    one, many = ("character", "characters") if isinstance(value, str) else ("entry", "entries")
    return f"{len(value)} {one if len(value) == 1 else many}"


def shown(value: object, spot: Spot | None = None, *, with_kind: bool = False) -> str:
    """A value as it stands in a message: short, spelled as YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        if spot and spot.text:
            return spot.text
        return f"{value:.12g}" if isinstance(value, float) else str(value)
    if isinstance(value, str):
        short = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
        return f"'{short}'" + (" (text)" if with_kind else "")
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else "nothing"
