"""Gain against drift of the study's methods, as SVG: text by hand, so that the same results give the same bytes."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, PANEL, LEFT, TOP, HEIGHT, GAP = 760, 320, 46, 34, 240, 38
_COLOURS = (
    "#000000",
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#666666",
    "#8B4513",
    "#4B0082",
)
_COLUMNS = 5

Point = tuple[float, float, float, float]
"""KL; difference from the base in points of percent, with the ends of its interval."""


def gain_against_drift(panels: Mapping[str, Mapping[str, Point]]) -> str:
    """A panel a task, drift on a logarithmic axis, and one legend.

    Args:
        panels: title -> method -> point.
    """
    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    rows = math.ceil(len(names) / _COLUMNS)
    total = TOP + HEIGHT + 44 + 20 * rows + 8
    every = [point for points in panels.values() for point in points.values()]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
    ]
    for place, (title, points) in enumerate(panels.items()):
        parts.append(_panel(LEFT + place * (PANEL + GAP), title, points, names, every))
    for place, name in enumerate(names):
        x, y = LEFT + (place % _COLUMNS) * 140, TOP + HEIGHT + 58 + 20 * (place // _COLUMNS)
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{_colour(place)}"/>{_text(x + 10, y, name)}')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, title: str, points: Mapping[str, Point], names: Sequence[str], every: Sequence[Point]) -> str:
    """All panels have the same axes."""
    low_x = math.floor(3 * math.log10(min(p[0] for p in every))) / 3
    high_x = math.ceil(3 * math.log10(max(p[0] for p in every))) / 3
    low_y = 20 * math.floor(min(0.0, *(p[2] for p in every)) / 20)
    high_y = 20 * math.ceil(max(0.0, *(p[3] for p in every)) / 20)

    def x_of(kl: float) -> float:
        return left + (math.log10(kl) - low_x) / max(high_x - low_x, 1e-9) * PANEL

    def y_of(points_of_percent: float) -> float:
        return TOP + HEIGHT - (points_of_percent - low_y) / max(high_y - low_y, 1e-9) * HEIGHT

    parts = [_text(left, TOP - 12, title, size=13)]
    for value in range(int(low_y), int(high_y) + 1, 20):
        colour = "#666666" if value == 0 else "#dddddd"
        parts.append(f'<path d="M{left} {y_of(value):.1f}h{PANEL}" stroke="{colour}"/>')
        parts.append(_text(left - 6, y_of(value) + 4, f"{value:+d}" if value else "0", anchor="end"))
    for kl in _marks(low_x, high_x):
        parts.append(f'<path d="M{x_of(kl):.1f} {TOP}v{HEIGHT}" stroke="#eeeeee"/>')
        parts.append(_text(x_of(kl), TOP + HEIGHT + 15, f"{kl:g}", anchor="middle"))
    parts.append(_text(left + PANEL / 2, TOP + HEIGHT + 33, "KL from the base, nats a token", anchor="middle"))
    for name, (kl, gain, low, high) in points.items():
        colour = _colour(names.index(name))
        parts.append(f'<path d="M{x_of(kl):.1f} {y_of(low):.1f}V{y_of(high):.1f}" stroke="{colour}" opacity="0.5"/>')
        parts.append(
            f'<circle cx="{x_of(kl):.1f}" cy="{y_of(gain):.1f}" r="5" fill="{colour}">'
            f"<title>{html.escape(name)}: {gain:+.0f}, KL {kl:.3f}</title></circle>"
        )
    return "\n".join(parts)


def _marks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... within two logarithms."""
    steps = (factor * 10.0**power for power in range(math.floor(low) - 1, math.ceil(high) + 1) for factor in (1, 2, 5))
    return [step for step in steps if low - 1e-9 <= math.log10(step) <= high + 1e-9]


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'
