"""Figures and tables as text, the same in a terminal and in a pipe."""

from collections.abc import Sequence

from tempflow_api.course import course
from tempflow_api.record import Spread

_BLOCKS = "▁▂▃▄▅▆▇█"


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def spread(value: Spread) -> str:
    """Mean and standard deviation."""
    return f"{number(value.mean)} ± {number(value.std)}"


def duration(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Bytes in the largest binary unit below them."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of ``values`` in at most ``width`` characters, each the mean of an equal share."""
    if not values:
        return ""
    means = course(values, width)
    low, span = min(means), max(means) - min(means)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((mean - low) / span * top) if span else 0] for mean in means)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, each column as wide as its widest entry."""
    widths = [max(len(entry) for entry in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
