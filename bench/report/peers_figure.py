"""Time and memory of every peer, README.md's picture: SVG by hand, so that the same result gives the same bytes.

Drawn 400 wide, at which a telephone shows it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.peers.names import OURS
from bench.records.verdict import Row

FIGURE = "peers.svg"
WIDTH, LEFT, BAR, STEP = 400, 158, 186, 22
# A relative error of the gradient above this is another result, not another rounding of the same.
CLOSE = 1e-3
_OURS, _OTHERS, _FLOOR = "#0072B2", "#9aa0a6", "#D55E00"


def figure(result: Mapping[str, Any], case: str, divergence: str) -> str:
    """Bars of a case of a result file, this package's first and the others by their time.

    Raises:
        ValueError: the file has no such rows.
    """
    rows = [row for row in result["rows"] if (row["case"], row["divergence"]) == (case, divergence)]
    # What is no more than products (the floor, the FMA peak) takes no memory and gives no result.
    timed = [row for row in rows if "failure" not in row and "extra_peak_bytes" in row]
    if not timed:
        raise ValueError(f"no peer has a time for {case}, {divergence}")
    timed.sort(key=lambda row: (row["peer"] != OURS, row["ratio_to_floor"]))
    first, environment = timed[0], result["environment"]
    products = f"{first['num_products']} bare matrix products"
    panels = [
        _panel(48, f"Time, as a multiple of the {products}", timed, lambda row: row["ratio_to_floor"], "{:.2f}"),
        _panel(
            88 + STEP * len(timed), "Extra peak memory, MB", timed, lambda row: row["extra_peak_bytes"] / 1e6, "{:.0f}"
        ),
    ]
    x_of_floor = LEFT + BAR / max(row["ratio_to_floor"] for row in timed)
    line = f'<path d="M{x_of_floor:.1f} 56v{STEP * len(timed)}" stroke="{_FLOOR}" stroke-dasharray="4 3"/>'
    bottom = 116 + 2 * STEP * len(timed)
    sizes = f"N = {first['num_rows']} tokens, H = {first['hidden_size']}, V = {first['vocab_size']}"
    views = f", K = {first['num_auxiliary']} views" if first["operation"] == "unisd_loss" else ""
    where = f"{environment['cpu']}, {environment['instruction_set']}, {environment['threads']} threads"
    notes = [
        f"{sizes}{views}, {first['dtype']}",
        where,
        f"torch {environment['versions']['torch']}; {environment['date'][:10]}; dashed: the products alone",
    ]
    if any(_far(row) for row in timed):
        notes.append(f"* its gradient is off by more than {CLOSE:g} of float64's")
    total = bottom + 17 * len(notes)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{total}" viewBox="0 0 {WIDTH} {total}" '
            'font-family="sans-serif">',
            f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
            _text(8, 22, f"UniSD* loss and its gradients, {divergence}", size=15),
            line,
            *panels,
            *(_text(8, bottom + 17 * place, note, size=12, colour="#444444") for place, note in enumerate(notes)),
            "</svg>\n",
        ]
    )


def _far(row: Row) -> bool:
    return bool(row.get("gradient_error", 0.0) > CLOSE)


def _panel(top: int, title: str, rows: Sequence[Row], value: Callable[[Row], float], style: str) -> str:
    """One bar a peer, its value behind it."""
    largest = max(value(row) for row in rows)
    parts = [_text(8, top, title, size=13)]
    for place, row in enumerate(rows):
        y, length = top + 10 + STEP * place, BAR * value(row) / largest
        colour = _OURS if row["peer"] == OURS else _OTHERS
        parts.append(_text(LEFT - 6, y + 13, row["peer"] + (" *" if _far(row) else ""), anchor="end"))
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{STEP - 5}" fill="{colour}"/>')
        parts.append(_text(LEFT + length + 5, y + 13, style.format(value(row))))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#000000") -> str:
    return (
        # On a border of the background's colour, for where the dashed line passes.
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" '
        'stroke="#ffffff" stroke-width="3" paint-order="stroke">'
        f"{html.escape(text)}</text>"
    )
