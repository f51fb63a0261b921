"""The house stays small: sizes of files and functions, prose that names what exists."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "tempflow_api": ROOT / "sdk/tempflow_api",
    "tempflow": ROOT / "sdk/tempflow",
    "tempflow_operator": ROOT / "operator/tempflow_operator",
    "tempflow_trainer": ROOT / "trainer/tempflow_trainer",
}
SOURCES = sorted(file for folder in PACKAGES.values() for file in folder.rglob("*.py"))
ALL_CODE = sorted({*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")})
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_BODY = 80
MEDIAN_BODY, NINETIETH_BODY = 10, 40


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def bodies(file: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every function's body, without its docstring."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            yield f"{relative(file)}:{node.name}", lines


@pytest.mark.parametrize("file", ALL_CODE, ids=relative)
def test_files_and_functions_are_small(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= MOST_LINES_OF_A_FILE, f"{relative(file)} has {lines} lines"
    long = [f"{name} ({n})" for name, n in bodies(file) if n > MOST_LINES_OF_A_BODY]
    assert not long, f"bodies over {MOST_LINES_OF_A_BODY} lines: {long}"


def test_most_functions_are_short() -> None:
    lengths = sorted(n for file in SOURCES for _, n in bodies(file))
    assert statistics.median(lengths) <= MEDIAN_BODY
    assert lengths[int(0.9 * len(lengths))] <= NINETIETH_BODY


def lines_of(files: list[Path]) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def test_there_is_a_test_line_for_every_source_line() -> None:
    tests = lines_of(sorted((ROOT / "tests").rglob("*.py")))
    assert tests >= lines_of(SOURCES)
    # What decides over other people's pods has more of them.
    operator = [*(ROOT / "tests/unit/operator").rglob("*.py"), *ROOT.glob("tests/cluster/*.py")]
    sources = [*PACKAGES["tempflow_operator"].rglob("*.py")]
    assert lines_of(operator) >= 1.5 * lines_of(sources)


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Code spans that look like a path of this repository.
NAMED_PATH = re.compile(
    r"`((?:sdk|operator|trainer|tests|docs|examples|benchmarks|charts|tools)/[\w./-]*\w)/?`"
)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_documents_name_what_exists(document: Path) -> None:
    text = document.read_text()
    missing = [path for path in NAMED_PATH.findall(text) if not (ROOT / path).exists()]
    missing += [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert not missing, f"{relative(document)} names what is not there: {missing}"


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "helpers", "common", "misc", "core", "manager", "processor"}
    assert not [relative(f) for f in SOURCES if f.stem in drawers or f.parent.name in drawers]


def test_the_examples_are_the_presets() -> None:
    """One source: what `tempflow init` writes is what the repository shows (`make generate`)."""
    presets = {f.name: f.read_text() for f in (ROOT / "sdk/tempflow/presets").glob("*.yaml")}
    shown = {f.name: f.read_text() for f in (ROOT / "examples").glob("*.yaml")}
    assert {name: shown.get(name) for name in presets} == presets
