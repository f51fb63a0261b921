"""What docs/learning.md reports is what its file of results holds, under today's names."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.learning import FULL, benchmark_of
from benchmarks.learning_report import BEGIN, END, tables
from benchmarks.learning_runs import Benchmark

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    return benchmark_of(replace(FULL, results=str(ROOT / FULL.results)))


def test_every_result_of_the_report_is_found(benchmark: Benchmark) -> None:
    """Otherwise the benchmark would measure again what it has."""
    stored = benchmark.results.lines
    assert benchmark.timing_key in stored
    tasks = benchmark.tuning_tasks() + benchmark.reported_tasks()
    assert [task for task in tasks if task.key not in stored] == []


def test_the_page_has_the_tables_of_these_results(benchmark: Benchmark) -> None:
    page = (ROOT / str(FULL.document)).read_text(encoding="utf-8")
    written = page.partition(BEGIN)[2].partition(END)[0]
    assert written == f"\n{tables(benchmark)}\n"
