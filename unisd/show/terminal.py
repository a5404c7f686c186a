"""Views side by side in a terminal: as many columns as fit, the rest below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from unisd.show.views import ShownView

NARROWEST = 38
"""Least width of a column."""


def side_by_side(views: Sequence[ShownView], width: int) -> str:
    """The views in columns, line by line; what the student does not read has a bar at its left."""
    columns = max(1, min(len(views), (width + 2) // (NARROWEST + 2)))
    size = (width - 2 * (columns - 1)) // columns
    blocks = []
    for start in range(0, len(views), columns):
        texts = [_lines(view, size) for view in views[start : start + columns]]
        height = max(map(len, texts))
        padded = [lines + [""] * (height - len(lines)) for lines in texts]
        blocks.append(
            "\n".join("  ".join(f"{line:<{size}}" for line in row).rstrip() for row in zip(*padded, strict=True))
        )
    return "\n\n".join(blocks)


def _lines(view: ShownView, width: int) -> list[str]:
    head = view.name.upper() + ("" if view.tokens is None else f" ({view.tokens} tokens)")
    lines = [head, *textwrap.wrap(view.what, width), "-" * width]
    marked: list[tuple[str, bool]] = [("", False)]
    for text, differs in view.parts:
        first, *others = text.split("\n")
        # A line belongs to what begins it.
        marked[-1] = (marked[-1][0] + first, marked[-1][1] if marked[-1][0] else differs)
        marked += [(line, differs) for line in others]
    for line, differs in marked:
        sign = "| " if differs else "  "
        wrapped = textwrap.wrap(line, width - 2, replace_whitespace=False, drop_whitespace=True) or [""]
        lines += [f"{sign}{part}".rstrip() for part in wrapped]
    return lines
