"""Views side by side in a terminal: as many columns as fit, the rest below."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Sequence

from unisd.show.views import ShownView

NARROWEST = 38
"""Least width of a column."""
_FILL = "\0"
"""Behind a character that a terminal shows two columns wide, meanwhile, so that lengths are widths."""


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
    return "\n\n".join(blocks).replace(_FILL, "")


class _Wrapper(textwrap.TextWrapper):
    """Text of wide characters, in which no blanks are, may end a line behind any of them."""

    def _split(self, text: str) -> list[str]:
        return [part for chunk in super()._split(text) for part in re.split(f"(.{_FILL})", chunk) if part]


def _filled(text: str) -> str:
    return "".join(one + _FILL if unicodedata.east_asian_width(one) in "WF" else one for one in text)


def _lines(view: ShownView, width: int) -> list[str]:
    head = view.name.upper() + ("" if view.tokens is None else f" ({view.tokens} tokens)")
    lines = [head, *textwrap.wrap(view.what, width), "-" * width]
    marked: list[tuple[str, bool]] = [("", False)]
    for text, differs in view.parts:
        first, *others = _filled(text).split("\n")
        # A line belongs to what begins it.
        marked[-1] = (marked[-1][0] + first, marked[-1][1] if marked[-1][0] else differs)
        marked += [(line, differs) for line in others]
    for line, differs in marked:
        sign = "| " if differs else "  "
        wrapped = _Wrapper(width - 2, replace_whitespace=False, drop_whitespace=True).wrap(line) or [""]
        lines += [f"{sign}{part}".rstrip() for part in wrapped]
    return lines
