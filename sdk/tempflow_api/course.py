"""A long series as a few numbers: its course."""

import itertools
from collections.abc import Sequence

POINTS = 40
"""Of a course in a job's status: the width of a sparkline, and half a kilobyte."""


def course(values: Sequence[float], points: int) -> list[float]:
    """At most ``points`` numbers, each the mean of an equal share of ``values``, in their order."""
    count = min(points, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
