"""`python -m bench expected`: the time of each design on an accelerator, from counts alone. Nothing here is measured.

    time = sum over products of max(FLOPs / P, bytes / B)  +  exposed elementwise bytes / B  (+ exposed arithmetic)

with two ceilings as inputs: P the rate of a library product (FLOP/s), B the bandwidth of a copy (bytes/s). Bytes of a
product are its operands and its result. A product of 2 N H V FLOPs is the unit of the floor.

    python -m bench expected --tflops 700 --bandwidth 2900e9
    python -m bench expected --measured ceilings.json --results bench.json     what a session on a GPU measured

The designs (fused, chunked, recomputed) with what each reads and writes are explained in docs/gpu.md.

Needs triton, whose tile shapes decide how many rows fit the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.cases import ACCELERATOR_CASES, Case
from bench.parser import command_parser
from bench.records import results_file
from unisd_kernels.backends import buffers, engine
from unisd_kernels.backends.buffers import row_stride, split_rows
from unisd_kernels.backends.triton.chunked_divergence import STATISTICS_COLUMNS
from unisd_kernels.backends.triton.configs import TABLE
from unisd_kernels.backends.triton.launch import ROW_PADDING
from unisd_kernels.backends.triton.statistics import NUM_PARTIALS

DESIGNS = ("fused", "chunked", "recomputed")
# Names of the peers of `bench/peers` that are these designs.
PEER_OF_DESIGN = {"fused": "unisd fused", "chunked": "unisd chunked"}
ARCHITECTURE = "sm_90"
# The width that the shares of epilogue arithmetic are for.
REFERENCE_WIDTH = 4096
FLOAT32 = 4
OPERAND = 2  # bytes of a bfloat16, and of a shifted logit
# Of the partial statistics of a block of columns: those that exist only for an entropy, and those that the pass for the
# gradient reads, a whole record, which is one sector of the memory.
ENTROPY_PARTIALS = 2
GRADIENT_PARTIALS = 8


@dataclass(frozen=True)
class Assumptions:
    """Ceilings and shares of one H100 SXM. None of these numbers is measured here.

    Attributes:
        product_flops: rate of a library product; what 35.5 ms for three products of the headline's shape (N = 8192,
            H = 4096, V = 128256) come to, the project's target figure.
        bandwidth: 0.87 of the data sheet's 3.35 TB/s.
        efficiency: rate of a Triton product as a share of the library's.
        loss_epilogue: arithmetic in the epilogue of student's and teacher's product, as a share of these two at
            H = 4096; it goes with 4096 / H. The compiled kernel has 60 instructions a pair of logits; a multiprocessor
            issues 128 lanes' worth a clock, and at `product_flops` and 1.755 GHz two products take 5.2 clocks a pair.
        scoring_epilogue: the same of a scoring, as a share of its one product: 12.6 instructions a logit.
        workspace: bytes of logits and gradient held at a time; None for the package's default on an accelerator.
        scoring_rows: rows for which a scoring reads the weight once.
    """

    product_flops: float = 727e12
    bandwidth: float = 0.87 * 3.35e12
    efficiency: float = 0.92
    loss_epilogue: float = 0.09
    scoring_epilogue: float = 0.04
    workspace: int | None = None
    scoring_rows: int = engine.SCORE_ROWS


class Rows(NamedTuple):
    """Rows of a chunk and of a block of it, and the bytes that a row of each holds."""

    chunk: int
    block: int
    chunk_row_bytes: int
    block_row_bytes: int

    @property
    def held_bytes(self) -> int:
        return self.chunk * self.chunk_row_bytes + self.block * self.block_row_bytes


@dataclass(frozen=True)
class Model:
    """Predictions for one case; times in seconds."""

    case: Case
    given: Assumptions = Assumptions()

    def product(
        self, rows: int, result_bytes: float, rate: float | None = None, extra: float = 0.0, views: int = 1
    ) -> float:
        """Products of 2 rows H V FLOPs each that read the weight together.

        Args:
            result_bytes: moved for the [rows, V] matrices, whichever side of the product they are on.
            rate: FLOP/s; None for the library's.
            extra: seconds of arithmetic that occupy the same units.
            views: how many products.
        """
        case, given = self.case, self.given
        flops = 2.0 * views * rows * case.hidden_size * case.vocab_size
        moved = result_bytes + OPERAND * case.hidden_size * (case.vocab_size + views * rows)
        return max(flops / (rate or given.product_flops) + extra, moved / given.bandwidth)

    def weight_gradient(self, rows: int, first: bool = False) -> float:
        """dW of a chunk, added to a float32 sum: reads and writes 4 bytes of every weight; the first only writes."""
        case, given = self.case, self.given
        flops = 2.0 * rows * case.hidden_size * case.vocab_size
        moved = (1.0 if first else 2.0) * FLOAT32 * case.vocab_size * case.hidden_size
        moved += OPERAND * rows * (case.vocab_size + case.hidden_size)
        return max(flops / given.product_flops, moved / given.bandwidth)

    @property
    def weight_gradient_end(self) -> float:
        """Seconds of dW after its last chunk: times the upstream and rounded to the weight's dtype, in one pass."""
        return (FLOAT32 + OPERAND) * self.case.vocab_size * self.case.hidden_size / self.given.bandwidth

    @property
    def floor(self) -> float:
        """The bare products, each with its [N, V] matrix in bfloat16."""
        case = self.case
        return case.num_products * self.product(case.num_rows, OPERAND * case.num_rows * case.vocab_size)

    def epilogue(self, rows: int, share: float) -> float:
        """Seconds of arithmetic on the logits of `rows` rows, from its share of one product at H = 4096."""
        return share * 2.0 * rows * REFERENCE_WIDTH * self.case.vocab_size / self.given.product_flops

    @property
    def workspace(self) -> int:
        default = engine.default_workspace_bytes(torch.device("cuda"), weight_gradient=not self.case.frozen_head)
        return default if self.given.workspace is None else self.given.workspace

    def rows(self, design: str) -> Rows:
        """Rows of chunk and block, as the two designs of backends/triton split them."""
        columns = self.case.vocab_size
        stride = row_stride(columns, ROW_PADDING)

        def partials(block_columns: int) -> int:
            return FLOAT32 * NUM_PARTIALS * -(-columns // block_columns)

        block_row_bytes = {
            "fused": OPERAND * stride + partials(_pair_columns()),
            "chunked": 2 * FLOAT32 * stride + partials(STATISTICS_COLUMNS),
            "recomputed": partials(_pair_columns()),
        }[design]
        chunk, block = split_rows(self.case.num_rows, self.workspace, OPERAND * stride, block_row_bytes)
        return Rows(chunk, block, OPERAND * stride, block_row_bytes)

    @property
    def scoring(self) -> float:
        """One log-probability a row; no logit is left."""
        given = self.given
        rate = given.efficiency * given.product_flops
        return sum(
            self.product(part, 0.0, rate, self.epilogue(part, given.scoring_epilogue))
            for part in _spans(self.case.num_rows, given.scoring_rows)
        )

    def partial_bytes(self, design: str) -> float:
        """Bytes of partial statistics that are written for a pair of logits."""
        block_columns = STATISTICS_COLUMNS if design == "chunked" else _pair_columns()
        # As `bench/peers/unisd.py` asks for it.
        want_entropy = self.case.operation == "unisd_loss"
        kept = NUM_PARTIALS if want_entropy else NUM_PARTIALS - ENTROPY_PARTIALS
        return FLOAT32 * kept / block_columns

    def exposed_bytes(self, design: str, jsd: bool = False) -> float:
        """Bytes a pair of logits that are moved outside the products. What a pass reads twice within a row or a tile
        counts once."""
        partials = self.partial_bytes(design)
        if design == "chunked":
            # Partial statistics are written by the pass and read by their combination.
            return 8 + 2 * partials + 8 * jsd + 8 + OPERAND
        if design == "recomputed":
            return partials
        # A pass for the gradient and, of a JSD, one for its sums; each reads the references of the blocks too.
        references = FLOAT32 * GRADIENT_PARTIALS / _pair_columns()
        return partials + (1 + jsd) * (2 * OPERAND + references) + OPERAND

    def forward(self, design: str, rows: int) -> float:
        """Student and teacher of one block of rows."""
        pairs, given = rows * self.case.vocab_size, self.given
        if design == "chunked":
            return 2 * self.product(rows, FLOAT32 * pairs)
        rate = given.efficiency * given.product_flops
        # The share is of two products.
        extra = 2 * self.epilogue(rows, given.loss_epilogue)
        partials = self.partial_bytes(design)
        if design == "fused":
            return self.product(rows, (2 * OPERAND + partials) * pairs, rate, extra, views=2)
        # Once for the statistics, once for the gradient.
        return sum(self.product(rows, kept * pairs, rate, extra, views=2) for kept in (partials, OPERAND))

    def divergence(self, design: str, jsd: bool = False) -> float:
        """Student, teacher, dh and, with a trainable head, dW."""
        if jsd and design == "recomputed":
            raise ValueError("a JSD of the recomputed design is not counted")
        case, given = self.case, self.given
        split = self.rows(design)
        total = 0.0 if case.frozen_head else self.weight_gradient_end
        for index, rows in enumerate(_spans(case.num_rows, split.chunk)):
            total += sum(self.forward(design, block) for block in _spans(rows, split.block))
            total += self.product(rows, OPERAND * rows * case.vocab_size)
            total += self.exposed_bytes(design, jsd) * rows * case.vocab_size / given.bandwidth
            if not case.frozen_head:
                total += self.weight_gradient(rows, first=index == 0)
        return total

    def seconds(self, design: str, jsd: bool = False) -> float:
        scorings = self.case.num_scorings * self.scoring if self.case.num_scorings else 0.0
        return scorings + (0.0 if self.case.operation == "scoring" else self.divergence(design, jsd))

    def ratio(self, design: str, jsd: bool = False) -> float:
        return self.seconds(design, jsd) / self.floor

    def least_efficiency(self, bar: float) -> float | None:
        """The efficiency of Triton's products from which `fused` meets the bar; None if the library's rate is not
        enough."""
        low, high = 0.3, 1.0

        def meets(efficiency: float) -> bool:
            return Model(self.case, replace(self.given, efficiency=efficiency)).ratio("fused") <= bar

        if not meets(high):
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high

    def memory(self, design: str) -> float:
        """Extra bytes at the peak, in the walk or where the gradient is handed over.

        The walk holds its buffers and the float32 gradients; the backward those, and what it returns.
        """
        case = self.case
        if case.operation == "scoring":
            return 3.0 * FLOAT32 * case.num_rows
        hidden = case.num_rows * case.hidden_size
        weight = 0 if case.frozen_head else case.vocab_size * case.hidden_size
        walk = self.rows(design).held_bytes + FLOAT32 * (hidden + weight)
        return max(walk, (FLOAT32 + OPERAND) * (hidden + weight))


def _pair_columns() -> int:
    """Columns of a block of partial statistics in the fused product."""
    config = TABLE[ARCHITECTURE]["fused-divergence"][0]
    return config.columns // config.parts


def _spans(total: int, step: int) -> list[int]:
    """Sizes of the chunks that the engine walks."""
    return [span.stop - span.start for span in buffers.spans(total, step)]


def measured_assumptions(file: Path) -> Assumptions:
    """The ceilings of `python -m bench ceilings --output FILE`, in place of the assumed ones."""
    result = results_file.read(file)
    return Assumptions(product_flops=result["product_tflop_per_s"] * 1e12, bandwidth=result["copy_gb_per_s"] * 1e9)


def measured_ratios(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Ratios to the floor by case and peer, of forward KL."""
    return {
        (row["case"], row["peer"]): row["ratio_to_floor"]
        for row in result["rows"]
        if "ratio_to_floor" in row and row["divergence"] in ("forward KL", "none")
    }


def case_table(given: Assumptions, cases: Sequence[Case], measured: dict[tuple[str, str], float] | None = None) -> str:
    titles = ["case", "products", "floor, ms", *DESIGNS, "bar", "fused meets it from", "memory of fused"]
    if measured is not None:
        titles += [f"{design}, measured" for design in PEER_OF_DESIGN]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case in cases:
        model = Model(case, given)
        bar = case.bars[0.0]
        least = model.least_efficiency(bar)
        cells = [case.name, str(case.num_products), f"{1e3 * model.floor:.3g}"]
        for design in DESIGNS:
            same = case.operation == "scoring" and design != "fused"
            cells.append("as fused" if same else f"{model.ratio(design):.2f}")
        cells += [f"{bar:.2f}", "above 1" if least is None else f"{least:.2f}"]
        memory = model.memory("fused")
        cells.append(f"{memory / 1e6:.0f} MB" if memory >= 1e6 else "< 1 MB")
        if measured is not None:
            for peer in PEER_OF_DESIGN.values():
                seen = measured.get((case.name, peer))
                cells.append("" if seen is None else f"{seen:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def design_table(given: Assumptions, case: Case) -> str:
    """The designs by count, for one case."""
    titles = [
        "design",
        "products",
        "rows a chunk",
        "rows a block",
        "bytes a pair outside products",
        "more for a JSD",
        "time / floor",
        "JSD",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    model = Model(case, given)
    for design in DESIGNS:
        exposed, split = model.exposed_bytes(design), model.rows(design)
        cells = [
            design,
            str(case.num_products + 2 * (design == "recomputed")),
            str(split.chunk),
            str(split.block),
            f"{exposed:.2f}",
        ]
        counted = design != "recomputed"
        more = f"+ {model.exposed_bytes(design, jsd=True) - exposed:.2f}" if counted else "not counted"
        cells += [more, f"{model.ratio(design):.2f}"]
        cells.append(f"{model.ratio(design, jsd=True):.2f}" if counted else "not counted")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(given: Assumptions, measured: dict[tuple[str, str], float] | None = None) -> str:
    frozen, trainable = ACCELERATOR_CASES[:2]
    held = " and ".join(
        f"{Model(case, given).workspace >> 20} MiB ({head} head)"
        for case, head in ((frozen, "frozen"), (trainable, "trainable"))
    )
    parts = [
        f"Products at {given.product_flops / 1e12:.0f} TFLOP/s, {given.bandwidth / 1e9:.0f} GB/s, Triton products "
        f"at {given.efficiency:.2f} of the library's,\nworkspace {held}.\n"
        "Ratios are expected time / floor, from counts"
        + ("; the columns that say so are measured." if measured is not None else ".")
    ]
    for case in (frozen, trainable):
        parts += [f"{case.name}:", design_table(given, case)]
    return "\n\n".join([*parts, "Every case:", case_table(given, ACCELERATOR_CASES, measured)])


def main(arguments: Sequence[str]) -> int:
    default = Assumptions()
    parser = command_parser("expected", __doc__)
    parser.add_argument("--tflops", type=float, default=default.product_flops / 1e12, help="of a library product")
    parser.add_argument("--bandwidth", type=float, default=default.bandwidth, help="bytes/s")
    parser.add_argument("--efficiency", type=float, default=default.efficiency, help="of Triton's products")
    parser.add_argument("--workspace-mib", type=int, help="in place of the package's default, for every case")
    parser.add_argument("--measured", type=Path, help="ceilings.json: both ceilings from there")
    parser.add_argument("--results", type=Path, help="bench.json of the suite: measured ratios beside the expected")
    options = parser.parse_args(arguments)
    ceilings = (
        measured_assumptions(options.measured)
        if options.measured
        else Assumptions(product_flops=options.tflops * 1e12, bandwidth=options.bandwidth)
    )
    workspace = None if options.workspace_mib is None else options.workspace_mib << 20
    given = replace(ceilings, efficiency=options.efficiency, workspace=workspace)
    measured = measured_ratios(results_file.read(options.results)) if options.results else None
    print(report(given, measured))
    return 0
