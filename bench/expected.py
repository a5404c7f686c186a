"""`python -m bench.expected`: the time of each design on an accelerator, from counts alone. Nothing here is measured.

    time = sum over products of max(FLOPs / P, bytes / B)  +  exposed elementwise bytes / B  (+ exposed arithmetic)

with two ceilings as inputs: P the rate of a library product (FLOP/s), B the bandwidth of a copy (bytes/s). Bytes of a
product are its operands and its result. A product of 2 N H V FLOPs is the unit of the floor.

    python -m bench.expected --tflops 700 --bandwidth 2900e9
    python -m bench.expected --measured ceilings.json --results bench.json     what a session on a GPU measured

The designs:

chunked     Library products on chunks of R rows, float32 logits of student and teacher in memory; then a pass over them
            for the statistics (reads 8 bytes a pair of logits), one for the gradient (reads 8, writes 2). A JSD reads
            8 more: its mixture needs both log-sum-exps first.
fused       The statistics are in the product's epilogue, which leaves 16-bit shifted logits (2 bytes each); one pass
            makes the gradient (reads 4 bytes a pair, writes 2 over them). A JSD reads 4 more.
recomputed  Nothing is kept: two products for the statistics, two again for the gradient, then dh (and dW).

A trainable head's dW is a float32 sum over the chunks: each one's product reads and writes 4 bytes of every weight.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import ACCELERATOR_CASES, Case

DESIGNS = ("fused", "chunked", "recomputed")
# Names of the contenders of `bench/peers` that are these designs.
CONTENDERS = {"fused": "unisd fused", "chunked": "unisd chunked"}
# The width that the shares of epilogue arithmetic are for.
REFERENCE_WIDTH = 4096
FLOAT32 = 4
OPERAND = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Assumptions:
    """For one H100 SXM. None of these numbers is measured here.

    Attributes:
        product_flops: rate of a library product; what 35.5 ms for three products of the headline's shape (N = 8192,
            H = 4096, V = 128256) come to, the project's target figure.
        bandwidth: 0.87 of the data sheet's 3.35 TB/s.
        efficiency: rate of a Triton product as a share of the library's.
        loss_epilogue: arithmetic in the epilogues of student's and teacher's product, as a share of these two at
            H = 4096; it goes with 4096 / H.
        scoring_epilogue: the same of a scoring (one exp a logit), as a share of its one product.
        workspace: bytes of logits held at a time.
        scoring_rows: rows for which a scoring reads the weight once.
    """

    product_flops: float = 727e12
    bandwidth: float = 0.87 * 3.35e12
    efficiency: float = 0.92
    loss_epilogue: float = 0.10
    scoring_epilogue: float = 0.06
    workspace: int = 352 << 20
    scoring_rows: int = 4096


@dataclass(frozen=True)
class Model:
    """Predictions for one case; times in seconds."""

    case: Case
    given: Assumptions = Assumptions()

    def product(self, rows: int, result_bytes: float, rate: float | None = None, extra: float = 0.0) -> float:
        """One product of 2 rows H V FLOPs.

        Args:
            result_bytes: moved for the [rows, V] matrix, whichever side of the product it is on.
            rate: FLOP/s; None for the library's.
            extra: seconds of arithmetic that occupy the same units.
        """
        case, given = self.case, self.given
        flops = 2.0 * rows * case.hidden_size * case.vocab_size
        moved = result_bytes + OPERAND * case.hidden_size * (case.vocab_size + rows)
        return max(flops / (rate or given.product_flops) + extra, moved / given.bandwidth)

    def weight_gradient(self, rows: int) -> float:
        """dW of a chunk, added to a float32 sum: reads and writes 4 bytes of every weight."""
        case, given = self.case, self.given
        flops = 2.0 * rows * case.hidden_size * case.vocab_size
        moved = 2.0 * FLOAT32 * case.vocab_size * case.hidden_size
        moved += OPERAND * rows * (case.vocab_size + case.hidden_size)
        return max(flops / given.product_flops, moved / given.bandwidth)

    @property
    def floor(self) -> float:
        """The bare products, each with its [N, V] matrix in bfloat16."""
        case = self.case
        return case.num_products * self.product(case.num_rows, OPERAND * case.num_rows * case.vocab_size)

    def epilogue(self, rows: int, share: float) -> float:
        """Seconds of arithmetic on the logits of `rows` rows, from its share of one product at H = 4096."""
        return share * 2.0 * rows * REFERENCE_WIDTH * self.case.vocab_size / self.given.product_flops

    def chunk_rows(self, design: str) -> int:
        """Rows whose logits fit the workspace: chunked holds 4 + 4 bytes a pair; fused 2 bytes for R rows of the one
        and R / 2 of the other; recomputed keeps the 16-bit gradient that dh is made from."""
        bytes_a_column = {"chunked": 8.0, "fused": 3.0, "recomputed": 2.0}[design]
        most = int(self.given.workspace / (bytes_a_column * self.case.vocab_size))
        return max(_parts(self.case.num_rows, max(1, most)))

    def scoring(self, design: str) -> float:
        """One log-probability a row. chunked writes the float32 logits in its product and reads them once more; the
        others leave no logit."""
        case, given = self.case, self.given
        if design == "chunked":
            rows = max(1, min(case.num_rows, int(given.workspace / (FLOAT32 * case.vocab_size))))
            return sum(
                self.product(part, FLOAT32 * part * case.vocab_size)
                + FLOAT32 * part * case.vocab_size / given.bandwidth
                for part in _parts(case.num_rows, rows)
            )
        rate = given.efficiency * given.product_flops
        return sum(
            self.product(part, 0.0, rate, self.epilogue(part, given.scoring_epilogue))
            for part in _parts(case.num_rows, given.scoring_rows)
        )

    def exposed_bytes(self, design: str, jsd: bool = False) -> int:
        """Bytes a pair of logits that are moved outside the products."""
        return {"chunked": 8 + 8 + 2 + 8 * jsd, "fused": 4 + 2 + 4 * jsd, "recomputed": 0}[design]

    def divergence(self, design: str, jsd: bool = False) -> float:
        """Student, teacher, dh and, with a trainable head, dW."""
        case, given = self.case, self.given
        rate = None if design == "chunked" else given.efficiency * given.product_flops
        kept = {"chunked": FLOAT32, "fused": OPERAND, "recomputed": 0}[design]
        total = 0.0
        for rows in _parts(case.num_rows, self.chunk_rows(design)):
            # The share is of two products; each carries half of it.
            extra = 0.0 if design == "chunked" else self.epilogue(rows, given.loss_epilogue)
            forward = 2 * self.product(rows, kept * rows * case.vocab_size, rate, extra)
            total += forward * (2 if design == "recomputed" else 1)
            total += self.product(rows, OPERAND * rows * case.vocab_size)
            total += self.exposed_bytes(design, jsd) * rows * case.vocab_size / given.bandwidth
            if not case.frozen_head:
                total += self.weight_gradient(rows)
        return total

    def seconds(self, design: str, jsd: bool = False) -> float:
        scorings = self.case.num_scorings * self.scoring(design) if self.case.num_scorings else 0.0
        return scorings + (0.0 if self.case.operation == "scoring" else self.divergence(design, jsd))

    def ratio(self, design: str, jsd: bool = False) -> float:
        return self.seconds(design, jsd) / self.floor

    def least_efficiency(self, bar: float) -> float | None:
        """The efficiency of Triton's products from which `fused` meets the bar; None if the library's rate is not
        enough."""
        low, high = 0.3, 1.0

        def meets(efficiency: float) -> bool:
            given = Assumptions(**{**self.given.__dict__, "efficiency": efficiency})
            return Model(self.case, given).ratio("fused") <= bar

        if not meets(high):
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high

    def memory(self, design: str) -> float:
        """Extra bytes at the peak: the logits of a chunk, the float32 row gradients kept for the backward, the gradient
        handed over; with a trainable head its float32 sum and the bfloat16 result."""
        case = self.case
        if case.operation == "scoring" and design != "chunked":
            return 3.0 * FLOAT32 * case.num_rows
        bytes_a_column = {"chunked": 8.0, "fused": 3.0, "recomputed": 2.0}[design]
        if case.operation == "scoring":
            return min(self.given.workspace, FLOAT32 * case.num_rows * case.vocab_size)
        total = self.chunk_rows(design) * bytes_a_column * case.vocab_size
        total += (FLOAT32 + OPERAND) * case.num_rows * case.hidden_size
        if not case.frozen_head:
            total += (FLOAT32 + OPERAND) * case.vocab_size * case.hidden_size
        return total


def _parts(total: int, most: int) -> list[int]:
    """As few chunks of at most `most` rows as there can be, of even size."""
    count = -(-total // most)
    return [total * (i + 1) // count - total * i // count for i in range(count)]


def measured_assumptions(file: Path) -> Assumptions:
    """The ceilings of `python -m bench.ceilings --output FILE`, in place of the assumed ones."""
    result = json.loads(file.read_text())
    return Assumptions(product_flops=result["product_tflop_per_s"] * 1e12, bandwidth=result["copy_gb_per_s"] * 1e9)


def measured_ratios(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    """By case and contender; of forward KL."""
    return {
        (row["case"], row["peer"]): row["ratio_to_floor"]
        for row in result["rows"]
        if "ratio_to_floor" in row and row["divergence"] in ("forward KL", "none")
    }


def case_table(given: Assumptions, cases: Sequence[Case], measured: dict[tuple[str, str], float] | None = None) -> str:
    titles = ["case", "products", "floor, ms", *DESIGNS, "bar", "fused meets it from", "memory of fused"]
    if measured is not None:
        titles += [f"{design}, measured" for design in CONTENDERS]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case in cases:
        model = Model(case, given)
        assert case.bar is not None
        least = model.least_efficiency(case.bar)
        cells = [case.name, str(case.num_products), f"{1e3 * model.floor:.3g}"]
        for design in DESIGNS:
            ratio = model.ratio(design)
            cells.append("as fused" if design == "recomputed" and case.operation == "scoring" else f"{ratio:.2f}")
        cells += [f"{case.bar:.2f}", "above 1" if least is None else f"{least:.2f}"]
        cells.append(f"{model.memory('fused') / 1e6:.0f} MB" if case.operation != "scoring" else "< 1 MB")
        if measured is not None:
            for contender in CONTENDERS.values():
                seen = measured.get((case.name, contender))
                cells.append("" if seen is None else f"{seen:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def design_table(given: Assumptions, case: Case) -> str:
    """The designs by count, for one case."""
    titles = [
        "design",
        "products",
        "rows a chunk",
        "bytes a pair outside products",
        "more for a JSD",
        "time / floor",
        "JSD",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    model = Model(case, given)
    for design in DESIGNS:
        exposed = model.exposed_bytes(design)
        cells = [
            design,
            str(case.num_products + 2 * (design == "recomputed")),
            str(model.chunk_rows(design)),
            str(exposed),
            f"+ {model.exposed_bytes(design, jsd=True) - exposed}",
            f"{model.ratio(design):.2f}",
            f"{model.ratio(design, jsd=True):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(given: Assumptions, measured: dict[tuple[str, str], float] | None = None) -> str:
    headline = ACCELERATOR_CASES[0]
    return "\n\n".join(
        [
            f"Products at {given.product_flops / 1e12:.0f} TFLOP/s, {given.bandwidth / 1e9:.0f} GB/s, Triton products "
            f"at {given.efficiency:.2f} of the library's, workspace {given.workspace >> 20} MiB.\n"
            "Ratios are expected time / floor, from counts"
            + ("; the columns that say so are measured." if measured is not None else "."),
            f"{headline.name}:",
            design_table(given, headline),
            "Every case:",
            case_table(given, ACCELERATOR_CASES, measured),
        ]
    )


def main() -> None:
    default = Assumptions()
    parser = argparse.ArgumentParser(
        prog="python -m bench.expected", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tflops", type=float, default=default.product_flops / 1e12, help="of a library product")
    parser.add_argument("--bandwidth", type=float, default=default.bandwidth, help="bytes/s")
    parser.add_argument("--efficiency", type=float, default=default.efficiency, help="of Triton's products")
    parser.add_argument("--workspace-mib", type=int, default=default.workspace >> 20)
    parser.add_argument("--measured", type=Path, help="ceilings.json: both ceilings from there")
    parser.add_argument("--results", type=Path, help="bench.json of the suite: measured ratios beside the expected")
    options = parser.parse_args()
    ceilings = (
        measured_assumptions(options.measured)
        if options.measured
        else Assumptions(product_flops=options.tflops * 1e12, bandwidth=options.bandwidth)
    )
    given = Assumptions(
        product_flops=ceilings.product_flops,
        bandwidth=ceilings.bandwidth,
        efficiency=options.efficiency,
        workspace=options.workspace_mib << 20,
    )
    measured = measured_ratios(json.loads(options.results.read_text())) if options.results else None
    print(report(given, measured))


if __name__ == "__main__":
    main()
