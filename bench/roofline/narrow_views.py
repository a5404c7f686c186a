"""`python -m bench narrow-views`: views scored by 8-bit products on a GPU, by count. Only what it says is measured is.

    time = 8-bit product + its epilogue + the product of the directions + codes of the rows + exact columns
           + tokens scored again + the look whether the head is the same

for UniSD* with K = 3 at the headline's shape, beside what the views cost now, counted in the same way. How many columns
get exact logits and how many tokens are scored again are those measured on a small model's hidden states (`python -m
bench certificate FILE --formats`): counts of columns are taken as they are, the share of all columns that is exact for
every row as a share. docs/gpu.md says what each part is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import CASES
from bench.parser import command_parser
from bench.records import results_file
from bench.roofline.expected import Assumptions
from bench.studies.view_formats import E4M3, INT8

MEASURED = Path(__file__).parents[1] / "results" / "intel-xeon-2-50ghz-f6-m85-avx512f" / "certificate_fp8.json"
CASE = CASES["llama3.1-8b.unisd_star.8192"]
FORMATS = {"int8": INT8, "e4m3": E4M3}
# Name -> the choice of exact columns whose figures it takes, for each format the one that costs it least.
_PROBABLE = {"int8": "above 1e-04, each column's length", "e4m3": "above 1e-05, each column's length"}
_FREQUENT = "the 8.3% most probable before"
DESIGNS = {
    "lists": _PROBABLE,
    "union": _PROBABLE,
    "frequent": dict.fromkeys(FORMATS, _FREQUENT),
    "none": dict.fromkeys(FORMATS, "none"),
}
TOLERANCE = "0.05"
PRODUCT = "8-bit product"
DIRECTIONS = 16
# bfloat16 products that stand for one with 16 more bits: of the row's two parts with the weight's two, less the last.
_PARTS_OF_DIRECTIONS = 3
# The row is bfloat16 as it is, the transform has two parts.
_PARTS_OF_TRANSFORM = 2
# Of H: the columns of the product that stands for the Gram matrix.
_EIGENVECTORS = 1 / 18
# Read h; write h', read it for its largest element and for the codes; write codes; write and read what is left.
_BYTES_OF_A_CODE = 2 + 4 + 4 + 4 + 1 + 4 + 4
# Instructions a logit: of a scoring; more for two scales, the row's floor, the list, the sums of squares and lengths.
_SCORING, _MORE = 12.6, 10.0
# The conversion of an int32, at half rate.
_OF_INTEGERS = 2.0
# Products after which Hopper's FP8 sums are added to float32 registers.
_PROMOTED_EVERY = 128


@dataclass(frozen=True)
class Card:
    """Rates of a GPU; the ratios between cards and formats are those of the vendor's data sheets.

    Attributes:
        product_flops, bandwidth: as in `Assumptions`.
        int8, fp8: rate of a product as a multiple of bfloat16's.
        lanes: instructions a second, a lane each.
        short_sums: FP8 sums have some 14 bits and need to be added to others.
    """

    name: str
    product_flops: float
    bandwidth: float
    int8: float
    fp8: float
    lanes: float
    short_sums: bool


_H100 = Assumptions()
_BLACKWELL = _H100.product_flops * 2250 / 989
CARDS = (
    Card("H100", _H100.product_flops, _H100.bandwidth, 2.0, 2.0, 132 * 128 * 1.755e9, True),
    Card("B200", _BLACKWELL, 0.87 * 7.7e12, 2.0, 2.0, 148 * 128 * 1.85e9, False),
    Card("B300", _BLACKWELL, 0.87 * 8.0e12, 0.15 / 2.25, 2.0, 148 * 128 * 1.85e9, False),
)


def exact(card: Card) -> float:
    """Seconds of the views as they are scored now."""
    rows = CASE.num_auxiliary * CASE.num_rows
    product = 2.0 * rows * CASE.hidden_size * CASE.vocab_size / (card.product_flops * _H100.efficiency)
    return product + _SCORING * rows * CASE.vocab_size / card.lanes


def parts(card: Card, code: str, design: str, measured: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part."""
    rows, width, columns = CASE.num_auxiliary * CASE.num_rows, CASE.hidden_size, CASE.vocab_size
    fused = card.product_flops * _H100.efficiency
    weight_row = 2.0 * width
    wanted = (FORMATS[code], DESIGNS[design][code])
    (found,) = (row for row in measured["columns"] if (row["format"], row["exact"]) == wanted)
    instructions = _SCORING + _MORE
    if code == "int8":
        instructions += _OF_INTEGERS
    elif card.short_sums:
        instructions += width / _PROMOTED_EVERY
    if design == "lists":
        columns_time = rows * found["a_row_mean"] * weight_row / card.bandwidth
    elif design == "union":
        union, blocks = found["a_block_mean"], rows / measured["block_rows"]
        columns_time = max(2.0 * rows * width * union / fused, blocks * union * weight_row / card.bandwidth)
    elif design == "frequent":
        chosen = columns * found["a_block_mean"] / found["columns"]
        columns_time = 2.0 * rows * width * chosen / fused + _SCORING * rows * chosen / card.lanes
    else:
        columns_time = 0.0
    transform = (_PARTS_OF_TRANSFORM + _EIGENVECTORS) * 2.0 * rows * width * width / card.product_flops
    return {
        PRODUCT: 2.0 * rows * width * columns / (fused * (card.int8 if code == "int8" else card.fp8)),
        "its epilogue": instructions * rows * columns / card.lanes,
        "product of the directions": 2.0 * rows * _PARTS_OF_DIRECTIONS * DIRECTIONS * columns / fused,
        "codes of the rows": transform + _BYTES_OF_A_CODE * rows * width / card.bandwidth,
        "exact columns": columns_time,
        "scored again": found["rescored"][TOLERANCE] * exact(card),
        "is the head the same?": weight_row * columns / card.bandwidth,
    }


def least_rate(card: Card, code: str, found: Mapping[str, float]) -> float | None:
    """The rate of 8-bit products, as a multiple of bfloat16's, from which something is saved; None where none is."""
    left = exact(card) - sum(found.values()) + found[PRODUCT]
    multiple = card.int8 if code == "int8" else card.fp8
    return multiple * found[PRODUCT] / left if left > 0.0 else None


def memory() -> dict[str, float]:
    """Bytes that stay: the codes of the head with what goes along the directions, in two parts; of a call: the codes of
    the views."""
    head = CASE.vocab_size * (CASE.hidden_size + 2 * 2 * DIRECTIONS + 4)
    return {"head": head, "views": CASE.num_auxiliary * CASE.num_rows * (CASE.hidden_size + 4.0)}


def report(measured: Mapping[str, Any]) -> str:
    """Markdown: the parts on an H100, the sums on every card."""
    first = CARDS[0]
    kinds = [(design, code) for design in DESIGNS for code in FORMATS]
    found = {kind: parts(first, kind[1], kind[0], measured) for kind in kinds}
    titles = [f"{design}, {code}" for design, code in kinds]
    lines = [f"| {first.name}, ms | {' | '.join(titles)} |", "|---" * (1 + len(kinds)) + "|"]
    for name in found[kinds[0]]:
        lines.append(f"| {name} | {' | '.join(f'{1e3 * found[kind][name]:.1f}' for kind in kinds)} |")
    sums = {kind: sum(found[kind].values()) for kind in kinds}
    lines.append(f"| **all** | {' | '.join(f'**{1e3 * sums[kind]:.1f}**' for kind in kinds)} |")
    now = exact(first)
    lines.append(f"| saved of {1e3 * now:.1f} | {' | '.join(f'{1e3 * (now - sums[kind]):.1f}' for kind in kinds)} |")
    rates = [least_rate(first, kind[1], found[kind]) for kind in kinds]
    lines.append(f"| pays from a rate of | {' | '.join('no' if rate is None else f'{rate:.2f}' for rate in rates)} |")
    lines += ["", f"| all views, ms | exact | {' | '.join(titles)} |", "|---" * (2 + len(kinds)) + "|"]
    for card in CARDS:
        each = [sum(parts(card, code, design, measured).values()) for design, code in kinds]
        cells = [f"{1e3 * seconds:.1f}" for seconds in (exact(card), *each)]
        lines.append(f"| {card.name} | {' | '.join(cells)} |")
    held = memory()
    lines += [
        "",
        f"Memory: {held['head'] / 1e6:.0f} MB that stay beside the head, {held['views'] / 1e6:.0f} MB of a call.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("narrow-views", __doc__)
    parser.add_argument("--certificate", type=Path, default=MEASURED, help="result of certificate --formats")
    options = parser.parse_args(list(arguments))
    print(report(results_file.read(options.certificate)))
    return 0
