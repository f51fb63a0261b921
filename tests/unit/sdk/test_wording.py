"""Figures as text."""

import pytest

from tempflow.wording import columns, duration, number, size, sparkline


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 41, "2.0 TiB")]
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


def test_number() -> None:
    assert [number(v) for v in (0.0, -1.23456, 12345.6, 1e-5)] == [
        "0",
        "-1.235",
        "1.235e+04",
        "1e-05",
    ]


class TestSparkline:
    def test_spans_the_range(self) -> None:
        assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"

    def test_is_no_wider_than_asked(self) -> None:
        assert sparkline(list(range(1000)), 4) == "▁▃▆█"

    def test_of_equal_values_is_flat(self) -> None:
        assert sparkline([2.0, 2.0], 8) == "▁▁"

    def test_of_nothing_is_nothing(self) -> None:
        assert sparkline([], 8) == ""


def test_columns_are_as_wide_as_needed() -> None:
    assert columns([["a", "bb", "c"], ["ddd", "e", ""]]) == ["a    bb  c", "ddd  e"]
