"""A series as a few numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow_api.course import course


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(1, 50))
def test_of_any_series(values: list[float], points: int) -> None:
    found = course(values, points)
    assert len(found) == min(points, len(values))
    if len(values) <= points:
        assert found == values
    else:
        assert all(min(values) - 1e-6 <= mean <= max(values) + 1e-6 for mean in found)


def test_shares_are_equal_and_in_order() -> None:
    assert course([float(n) for n in range(12)], 4) == [1, 4, 7, 10]
    assert course([0.0, 1.0, 2.0], 2) == pytest.approx([0.5, 2.0])
