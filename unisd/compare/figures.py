"""Figures as SVG inside the page: they need no script and no file, and take the page's colours."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 38
Points = Sequence[tuple[float, float]]


def lines(series: Sequence[tuple[str, Points]], x_label: str, y_label: str) -> str:
    """Curves, one for each run in the order of the runs; "" where none has two points."""
    drawn = [(place, name, points) for place, (name, points) in enumerate(series) if len(points) > 1]
    if not drawn:
        return ""
    frame = _Frame([point for _, _, points in drawn for point in points], x_label, y_label)
    body = [
        f'<polyline class="line run{place % 8}" points="{" ".join(frame.at(x, y) for x, y in points)}">'
        f"<title>{html.escape(name)}</title></polyline>"
        for place, name, points in drawn
    ]
    return frame.around("".join(body))


def scatter(named: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str:
    """A dot and a name for each (name, x, y), coloured by its place; "" for fewer than two."""
    if len(named) < 2:
        return ""
    frame = _Frame([(x, y) for _, x, y in named] + [(0.0, 0.0)], x_label, y_label)
    body = []
    for place, (name, x, y) in enumerate(named):
        px, py = (float(part) for part in frame.at(x, y).split(","))
        shift, anchor = (8, "start") if px < WIDTH * 0.6 else (-8, "end")
        body.append(
            f'<circle class="dot run{place % 8}" cx="{px}" cy="{py}" r="5"><title>{html.escape(name)}</title></circle>'
            f'<text x="{px + shift}" y="{py - 6}" text-anchor="{anchor}">{html.escape(name)}</text>'
        )
    return frame.around("".join(body))


class _Frame:
    """Axes around some points, with round numbers at their marks."""

    def __init__(self, points: Points, x_label: str, y_label: str) -> None:
        self._xs, self._ys = _marks([x for x, _ in points]), _marks([y for _, y in points])
        self._labels = x_label, y_label

    def at(self, x: float, y: float) -> str:
        """Place of a point, "x,y"."""
        across = (x - self._xs[0]) / (self._xs[-1] - self._xs[0])
        up = (y - self._ys[0]) / (self._ys[-1] - self._ys[0])
        px = _LEFT + across * (WIDTH - _LEFT - _RIGHT)
        return f"{px:.1f},{HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM):.1f}"

    def around(self, body: str) -> str:
        x_label, y_label = map(html.escape, self._labels)
        parts = []
        for x in self._xs:
            px = self.at(x, self._ys[0]).split(",")[0]
            parts.append(f'<text x="{px}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{x:g}</text>')
        for y in self._ys:
            py = self.at(self._xs[0], y).split(",")[1]
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{py}" y2="{py}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{float(py) + 4}" text-anchor="end">{y:g}</text>')
        parts.append(f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>')
        label = f"{y_label} against {x_label}"
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}{body}</svg>'


def _marks(values: Sequence[float]) -> list[float]:
    """Three to six round numbers that span the values."""
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]
