"""Line charts as SVG: drawn here because the page must carry no script and fetch nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 30
COLOURS = ("#3274d9", "#d9822b", "#3a9d5d", "#c23b4b", "#8457c9", "#4aa3a8")


@dataclass(frozen=True)
class Line:
    """A curve over epochs; ``spread`` is drawn as a band of plus and minus its value."""

    label: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] | None = None
    faint: bool = False
    """A noisy curve that stands behind another one."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them, in steps of 1, 2 or 5."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def chart(title: str, lines: Sequence[Line]) -> str:
    """An SVG of ``lines``, with axes, a legend, and its values as tooltips; empty without points.

    Values that are not finite are left out: a gap says more than a wrong point.
    """
    lines = [_finite(line) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    frame = _Frame.around(lines)
    body = [frame.grid()]
    for index, line in enumerate(lines):
        body.append(_curve(frame, line, COLOURS[index % len(COLOURS)]))
    legend = "".join(
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(line.label)}</span>'
        for i, line in enumerate(lines)
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{"".join(body)}</svg><div class="legend">{legend}</div></figure>'
    )


@dataclass(frozen=True)
class _Frame:
    """From data to the drawing."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, lines: Sequence[Line]) -> "_Frame":
        xs = [x for line in lines for x, _ in line.points]
        ys = [
            y + side * width
            for line in lines
            for (_, y), width in zip(
                line.points, line.spread or [0.0] * len(line.points), strict=True
            )
            for side in (-1, 1)
        ]
        low, high = min(ys), max(ys)
        # A constant curve lies in the middle; its frame must have a height.
        margin = 0.04 * (high - low) or max(abs(low) * 0.1, 0.5)
        return cls(min(xs), max(max(xs), min(xs) + 1), low - margin, high + margin)

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> str:
        parts = []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(
                f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
            )
        for value in ticks(self.left, self.right, 6):
            parts.append(
                f'<text x="{self.x(value):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">'
                f"{value:.6g}</text>"
            )
        return "".join(parts)


def _finite(line: Line) -> Line:
    spreads = line.spread or [0.0] * len(line.points)
    kept = [
        (point, spread)
        for point, spread in zip(line.points, spreads, strict=True)
        if math.isfinite(point[1]) and math.isfinite(spread)
    ]
    return Line(
        line.label,
        [point for point, _ in kept],
        [spread for _, spread in kept] if line.spread else None,
        line.faint,
    )


def _curve(frame: _Frame, line: Line, colour: str) -> str:
    if not line.points:
        return ""
    at = [(frame.x(x), frame.y(y)) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    strength = "0.35" if line.faint else "1"
    parts = []
    if line.spread:
        upper = [
            (frame.x(x), frame.y(y + s)) for (x, y), s in zip(line.points, line.spread, strict=True)
        ]
        lower = [
            (frame.x(x), frame.y(y - s)) for (x, y), s in zip(line.points, line.spread, strict=True)
        ]
        band = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*upper, *reversed(lower)])
        parts.append(f'<path d="M{band}Z" fill="{colour}" fill-opacity="0.12"/>')
    parts.append(
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-opacity="{strength}" '
        'stroke-width="1.8"/>'
    )
    # A tooltip a point; of a long curve a selection, unseen, so that the page stays small and calm.
    stride = max(1, len(at) // 60)
    shown = "1" if len(at) <= 30 else "0"
    for (x, y), (epoch, value) in list(zip(at, line.points, strict=True))[::stride]:
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="{shown}">'
            f"<title>{escape(line.label)}, epoch {epoch:g}: {value:.5g}</title></circle>"
        )
    return "".join(parts)
