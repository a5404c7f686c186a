"""`python -m bench certificate FILE ... --formats`: the certified intervals from FP8 codes beside those from int8.

The bounds of `unisd_kernels/reference/certified.py` take the rounding errors of a weight and of a row as they are, so
they hold for any codes. What differs is how long those errors are. An int8 step is the same for a whole row, 1/254 of
its largest element at most; once a row is turned at random that is some 0.7% of its length. FP8 rounds each element by
up to 1/16 (e4m3: three bits of mantissa) or 1/8 (e5m2) of itself: 2.5% and 5% of the length, whatever the row, the
coordinates and the scale. A scale by row or by block of 32 (as in MXFP8) moves where the steps of the mantissa fall, no
more, unless numbers leave the range; so e4m3 also has the best of 4 scales a row.

Then, for int8 and e4m3, which columns get exact logits: those above a probability, or the same ones for all rows, the
most probable on the tokens that prepared the head; and a sharper bound, by the length of each column's own error in
place of the longest of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.studies.sampled_views import NUM_VIEWS, FileViews
from bench.studies.view_bounds import Coordinates, Rounding, RowScores, rescored, spread_of
from unisd_kernels import LMHead
from unisd_kernels.certified.coordinates import RANK, directions_and_transform
from unisd_kernels.certified.scores import THRESHOLD, LogProbBounds
from unisd_kernels.reference.certified import int8_rows

# Tokens whose rows, one for each view, stand together: of a block of rows on a GPU.
BLOCK_TOKENS = 42
THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2)
# Shares of all columns.
FREQUENT = (1 / 48, 1 / 12, 1 / 6)
# Of H, for a Gram matrix that costs less.
_EIGENVECTORS = 1 / 18


def fp8_rows(values: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, scales: int = 1) -> torch.Tensor:
    """Rows rounded to multiples of FP8 numbers, the largest element to the largest of them.

    Args:
        scales: of so many scales within a factor of two, the one that leaves the shortest error.
    """
    largest = values.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest)) / torch.finfo(dtype).max
    best, least = torch.zeros_like(values), torch.full_like(unit, torch.inf)
    for place in range(scales):
        scale = unit * 2.0 ** (place / scales)
        rounded = (values / scale).to(dtype).to(values.dtype) * scale
        distance = (values - rounded).square().sum(-1, keepdim=True)
        best = torch.where(distance < least, rounded, best)
        least = torch.minimum(distance, least)
    return best


class Format(NamedTuple):
    rounding: Rounding
    directions: int = RANK
    is_turned: bool = True
    few_eigenvectors: bool = False


E4M3, INT8 = "e4m3, best of 4 scales a row", "int8"
FORMATS = {
    INT8: Format(int8_rows),
    "int8, 64 directions": Format(int8_rows, directions=64),
    "int8, eigenvectors of the Gram matrix: an 18th of H": Format(int8_rows, few_eigenvectors=True),
    "e4m3, largest element to 448": Format(fp8_rows),
    E4M3: Format(partial(fp8_rows, scales=4)),
    "e4m3, best scale, 64 directions": Format(partial(fp8_rows, scales=4), directions=64),
    "e4m3, best scale, not turned": Format(partial(fp8_rows, scales=4), is_turned=False),
    "e5m2, best scale": Format(partial(fp8_rows, dtype=torch.float8_e5m2, scales=4)),
}


class _Blocks(NamedTuple):
    """The tokens that did not prepare the head, their views side by side."""

    hidden: torch.Tensor  # [N K, H]
    ids: torch.Tensor  # [N K]

    def scores(self, head: LMHead, at: Coordinates, rounding: Rounding) -> Iterator[RowScores]:
        step = BLOCK_TOKENS * NUM_VIEWS
        for start in range(0, len(self.ids), step):
            rows = slice(start, start + step)
            yield RowScores.of(self.hidden[rows], head, self.ids[rows], at, rounding)


class _Found:
    """Intervals and exact scores, block by block."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, bounds: LogProbBounds, exact: torch.Tensor) -> None:
        self.parts.append((*bounds, exact))

    def summary(self) -> dict[str, Any]:
        lower, upper, exact = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        lower_of, upper_of, scores = (values.view(-1, NUM_VIEWS).T.contiguous() for values in (lower, upper, exact))
        return {
            **spread_of(LogProbBounds(lower, upper), exact),
            "rescored": rescored(LogProbBounds(lower_of, upper_of), scores),
        }


def coordinates(head: LMHead, prepared: torch.Tensor, of: Format) -> Coordinates:
    """Those of `Int8Head.of` for the same rows, if the format is int8."""
    weight, rows = head.active_weight.double(), prepared.double()
    lead, transform, inverse = directions_and_transform(
        rows.T @ rows / len(rows), weight.T @ weight / len(weight), of.directions
    )
    if not of.is_turned:
        # The symmetric one of the transforms that differ by a rotation.
        values, vectors = torch.linalg.eigh(transform @ transform.T)
        transform = (vectors * values.sqrt()) @ vectors.T
        inverse = (vectors / values.sqrt()) @ vectors.T
    found = Coordinates.rounded(head, lead, transform, inverse, of.rounding)
    return found.with_few_eigenvectors(int(len(found.gram) * _EIGENVECTORS)) if of.few_eigenvectors else found


def measure(head: LMHead, files: Sequence[FileViews]) -> dict[str, Any]:
    """`formats`: a row for each of `FORMATS`. `columns`: a row for each choice of exact columns."""
    from tqdm import tqdm

    halves = [each.split() for each in files]
    prepared = torch.cat([first.views.flatten(0, 1) for first, _ in halves])
    views = torch.cat([second.views for _, second in halves], 1)
    ids = torch.cat([second.ids for _, second in halves])
    blocks = _Blocks(views.transpose(0, 1).flatten(0, 1), ids.repeat_interleave(NUM_VIEWS))
    formats, columns = [], []
    for name, of in tqdm(FORMATS.items(), desc="formats"):
        at = coordinates(head, prepared, of)
        found = _Found()
        for rows in blocks.scores(head, at, of.rounding):
            found.add(rows.interval(rows.share > THRESHOLD, THRESHOLD), rows.exact)
        row = blocks.hidden.double() @ at.inverse
        lost = (row - of.rounding(row)).norm(dim=-1) / row.norm(dim=-1)
        formats.append({"format": name, "tokens": len(ids), "rounded_off": float(lost.median()), **found.summary()})
        if name in (INT8, E4M3):
            columns += _columns(head, prepared, blocks, at, of.rounding, name)
    return {"block_rows": BLOCK_TOKENS * NUM_VIEWS, "formats": formats, "columns": columns}


def _columns(
    head: LMHead, prepared: torch.Tensor, blocks: _Blocks, at: Coordinates, rounding: Rounding, name: str
) -> list[dict[str, Any]]:
    """Choices of columns with exact logits."""
    width = len(head.active_weight)
    probable = (prepared @ head.active_weight.T).softmax(-1).mean(0).argsort(descending=True)
    frequent = {}
    for share in FREQUENT:
        chosen = torch.zeros(width, dtype=torch.bool)
        frequent[f"the {share:.1%} most probable before"] = chosen.index_fill_(0, probable[: int(share * width)], True)
    above = {f"above {threshold:.0e}": threshold for threshold in THRESHOLDS}
    by_column = {f"{choice}, each column's length": choice for choice in above}
    found = {choice: _Found() for choice in (*above, *by_column, *frequent, "none")}
    counts: dict[str, list[torch.Tensor]] = {choice: [] for choice in above}
    unions: dict[str, list[int]] = {choice: [] for choice in above}
    for rows in blocks.scores(head, at, rounding):
        for choice, of in found.items():
            largest: float | torch.Tensor
            if choice in by_column:
                of.add(rows.interval_by_column(rows.share > above[by_column[choice]]), rows.exact)
                continue
            if choice in above:
                chosen, largest = rows.share > above[choice], above[choice]
                counts[choice].append(chosen.sum(-1))
                unions[choice].append(int(chosen.any(0).sum()))
            else:
                chosen = frequent.get(choice, torch.zeros(width, dtype=torch.bool)).expand_as(rows.share)
                largest = rows.share.masked_fill(chosen, 0.0).amax(-1)
            of.add(rows.interval(chosen, largest), rows.exact)
    out = []
    for choice, of in found.items():
        row: dict[str, Any] = {"format": name, "exact": choice, "columns": width, **of.summary()}
        counted = by_column.get(choice, choice)
        if counted in above:
            each = torch.cat(counts[counted]).double()
            row |= {"a_row_mean": float(each.mean()), "a_row_median": float(each.median())}
            row |= {"a_row_max": int(each.max()), "a_block_mean": sum(unions[counted]) / len(unions[counted])}
        elif choice in frequent:
            row["a_block_mean"] = float(frequent[choice].sum())
        out.append(row)
    return out


def table(result: dict[str, Any]) -> str:
    """Markdown: formats, then choices of exact columns."""
    rows, tolerances = result["formats"], list(result["formats"][0]["rescored"])
    ends = ["half width, median", "0.9", "largest", *tolerances]
    lines = [
        f"{result['model']}, {rows[0]['tokens']} sampled tokens under K = {NUM_VIEWS} contexts; rows from "
        f"{', '.join(result['files'])}. What rounding takes of a row's length, half widths in nats, shares of tokens "
        f"scored again for a tolerance (columns above {THRESHOLD:.0e} exact):",
        "",
        f"| codes | rounded off | {' | '.join(ends)} |",
        "|---" * (2 + len(ends)) + "|",
    ]
    lines += [f"| {row['format']} | {row['rounded_off']:.2%} | {' | '.join(_ends(row))} |" for row in rows]
    lines += [
        "",
        f"Which columns get exact logits, of {result['columns'][0]['columns']}: how many a row, and by how many of "
        f"{result['block_rows']} rows together (the views of {BLOCK_TOKENS} tokens) they are wanted:",
        "",
        f"| codes | exact | a row: mean | median | most | a block | {' | '.join(ends)} |",
        "|---" * (6 + len(ends)) + "|",
    ]
    for row in result["columns"]:
        counts = [f"{row[name]:.0f}" if name in row else "" for name in ("a_row_mean", "a_row_median", "a_row_max")]
        block = f"{row['a_block_mean']:.0f}" if "a_block_mean" in row else ""
        lines.append(f"| {' | '.join([row['format'], row['exact'], *counts, block, *_ends(row)])} |")
    outside = max(row["largest_outside"] for row in (*rows, *result["columns"]))
    lines += ["", f"Exact scores are outside by {outside:.1e} nats at most (below 0: inside)."]
    return "\n".join(lines)


def _ends(row: dict[str, Any]) -> list[str]:
    widths = [f"{row[name]:.2g}" for name in ("half_width_median", "half_width_p90", "half_width_max")]
    return [*widths, *(f"{share:.1%}" for share in row["rescored"].values())]
