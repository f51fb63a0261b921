"""Writes the chart's README from the comments in its values.yaml.

python tools/chart_readme.py            write charts/tempflow/README.md
python tools/chart_readme.py --check    exit 1 when the file differs from what would be written
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parents[1] / "charts" / "tempflow"
BEGIN = "<!-- values: begin, written by tools/chart_readme.py -->"
END = "<!-- values: end -->"


class Undocumented(Exception):
    """A value without a comment, or a README without the two marks."""


@dataclass(frozen=True)
class Value:
    """One row: the path to set it by, its default, and what the comment says."""

    path: str
    default: object
    text: str


def documented_values(source: str) -> list[Value]:
    """The values of a file whose every value, or a block around it, has a comment above it.

    A block with a comment is one value; a block without is the values in it.
    """
    root = yaml.compose(source, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise Undocumented("values.yaml is not a mapping")
    return list(_walk(root, "", source.splitlines()))


def _walk(block: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Value]:
    for key, node in block.value:
        path = f"{prefix}{key.value}"
        text = _comment_above(key.start_mark.line, lines)
        if text:
            yield Value(path, _default(node), text)
        elif isinstance(node, yaml.MappingNode) and node.value:
            yield from _walk(node, f"{path}.", lines)
        else:
            raise Undocumented(f"{path} has no comment in values.yaml")


def _comment_above(line: int, lines: list[str]) -> str:
    first = line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(text.strip().removeprefix("#").strip() for text in lines[first:line])


def _default(node: yaml.Node) -> object:
    loaded: object = yaml.safe_load(yaml.serialize(node))
    return loaded


def table(values: list[Value]) -> str:
    """The values as a table in Markdown."""
    rows = ["| Value | Default | Meaning |", "| --- | --- | --- |"]
    for value in values:
        default = json.dumps(value.default)
        rows.append(f"| `{value.path}` | `{default}` | {value.text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def readme(current: str, source: str) -> str:
    """The README with the table between its marks written anew."""
    before, begin, rest = current.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Undocumented(f"README.md lacks the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table(documented_values(source))}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    options = parser.parse_args(arguments)
    path = CHART / "README.md"
    current = path.read_text(encoding="utf-8")
    try:
        wanted = readme(current, (CHART / "values.yaml").read_text(encoding="utf-8"))
    except Undocumented as error:
        print(error, file=sys.stderr)
        return 1
    if options.check and wanted != current:
        print(f"{path.name} differs from values.yaml: run tools/chart_readme.py", file=sys.stderr)
        return 1
    if not options.check:
        path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
