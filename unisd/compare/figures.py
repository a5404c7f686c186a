"""Geometry of figures, which a template draws as SVG: no script, no file, in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 38
_LINE = 13.0
"""Height of a name beside a dot."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A number at an axis, and where it is."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve; `place` is that of its run's group, which has its colour."""

    place: int
    name: str
    points: str
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Dot:
    """A point with its name, and bars over the least and the most of both numbers where they differ."""

    place: int
    name: str
    x: float
    y: float
    left: float
    right: float
    top: float
    bottom: float
    text_x: float
    text_y: float
    anchor: str


@dataclass(frozen=True)
class Figure:
    """What a template needs to draw."""

    x_label: str
    y_label: str
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    lines: tuple[Line, ...]
    dots: tuple[Dot, ...]
    height: int
    width: int = WIDTH
    left: int = _LEFT
    right: int = WIDTH - _RIGHT

    @property
    def bottom(self) -> int:
        """Where the horizontal axis is."""
        return self.height - _BOTTOM


@dataclass(frozen=True)
class Ranged:
    """A number with the least and the most that it stands for."""

    value: float
    low: float
    high: float


def lines(
    series: Sequence[tuple[int, str, Points]], x_label: str, y_label: str, *, dots: bool = False, share: bool = False
) -> Figure | None:
    """Curves of (place, name, points); None where none has two points.

    Args:
        dots: whether to show where the points are.
        share: whether the vertical axis is 0 to 100%, whatever the values.
    """
    drawn = [each for each in series if len(each[2]) > 1]
    if not drawn:
        return None
    points = [point for _, _, points in drawn for point in points]
    frame = _Frame(points + ([(points[0][0], 0.0), (points[0][0], 100.0)] if share else []))
    return frame.figure(
        x_label,
        y_label,
        lines=tuple(
            Line(
                place,
                name,
                " ".join("{:.1f},{:.1f}".format(*frame.at(x, y)) for x, y in points),
                tuple(frame.at(x, y) for x, y in points) if dots else (),
            )
            for place, name, points in drawn
        ),
    )


def scatter(named: Sequence[tuple[int, str, Ranged, Ranged]], x_label: str, y_label: str) -> Figure | None:
    """A dot with a name and bars for each (place, name, x, y); None for fewer than two."""
    if len(named) < 2:
        return None
    ends = [(a, b) for _, _, x, y in named for a, b in ((x.low, y.low), (x.high, y.high), (x.value, y.value))]
    frame = _Frame([*ends, (0.0, 0.0)], HEIGHT + 16 * max(0, len(named) - 4))
    middles = [frame.at(x.value, y.value) for _, _, x, y in named]
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in middles]
    dots: list[Dot] = []
    for place, name, x, y in named:
        px, py = middles[len(dots)]
        left, bottom = frame.at(x.low, y.low)
        right, top = frame.at(x.high, y.high)
        shift, anchor = (8, "start") if px < WIDTH * 0.6 else (-8, "end")
        text_y = _free(px + shift, py - 6, name, anchor, taken, frame.height - _BOTTOM)
        dots.append(Dot(place, name, px, py, left, right, top, bottom, px + shift, text_y, anchor))
    return frame.figure(x_label, y_label, dots=tuple(dots))


def _free(
    x: float, y: float, name: str, anchor: str, taken: list[tuple[float, float, float, float]], bottom: float
) -> float:
    """The height nearest to y at which a name hides no dot and none of the names before; takes it."""
    width = 6.2 * len(name)
    left = x if anchor == "start" else x - width
    for step in sorted(range(-20, 21), key=abs):
        top = y + step * _LINE / 2
        box = (left, top - _LINE, left + width, top)
        inside = top - _LINE >= 0 and top <= bottom
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return top
    return y


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


class _Frame:
    """Axes around some points, with round numbers at their marks."""

    def __init__(self, points: Points, height: int = HEIGHT) -> None:
        self.height = height
        xs, ys = [x for x, _ in points], [y for _, y in points]
        # Between two whole numbers of steps there is none.
        self._xs, self._ys = _marks(xs, whole=all(float(x).is_integer() for x in xs)), _marks(ys)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place of a point."""
        across = (x - self._xs[0]) / (self._xs[-1] - self._xs[0])
        up = (y - self._ys[0]) / (self._ys[-1] - self._ys[0])
        px = _LEFT + across * (WIDTH - _LEFT - _RIGHT)
        return round(px, 1), round(self.height - _BOTTOM - up * (self.height - _TOP - _BOTTOM), 1)

    def figure(self, x_label: str, y_label: str, *, lines: tuple[Line, ...] = (), dots: tuple[Dot, ...] = ()) -> Figure:
        xs = tuple(Mark(self.at(x, self._ys[0])[0], f"{x:g}") for x in self._xs)
        ys = tuple(Mark(self.at(self._xs[0], y)[1], f"{y:g}") for y in self._ys)
        return Figure(x_label, y_label, xs, ys, lines, dots, self.height)


def _marks(values: Sequence[float], whole: bool = False) -> list[float]:
    """Two to seven round numbers that span the values; `whole`: whole ones."""
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    if whole:
        step = float(max(1, math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]
