"""`python -m bench tensor-parallel`: bytes and messages of a vocabulary-parallel head, by formula.

With what a rank computes and holds, and times by assumed rates; nothing here is timed. That the formulas are what
`unisd_kernels` sends is tested with counting ranks (tests/bench/test_tensor_parallel.py). Exchanged numbers and
assumptions: docs/tensor-parallel.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bench.cases import CASES, HEADLINE_ROWS, Case
from bench.parser import command_parser
from bench.roofline.expected import FLOAT32, OPERAND, Model

RANKS = (2, 8, 64)
STATISTIC = 8  # bytes of a float64
GRADIENT_MESSAGE = 16 << 20  # bytes at most, in whole tiles of rows
TILE = 128
# Assumed, not measured: seconds that a small message takes, bytes/s of a ring within a machine and between machines.
LATENCY = 25e-6
RINGS = (400e9, 50e9)
# Of the two designs in gpu.md the one that exchanges statistics between products and gradient.
DESIGN = "chunked"
HEADS = ("llama3.1-8b", "gemma3-4b")
# Title of an operation -> (operation of `bench/cases.py`, whether its divergence is the JSD).
OPERATIONS = {
    "forward KL": ("kl", False),
    "JSD": ("kl", True),
    "forward KL, trainable head": ("kl_trainable", False),
    "scoring": ("scoring", False),
    "UniSD*, K = 3": ("unisd_star", False),
}


class Exchange(NamedTuple):
    """Float64 numbers a row, each field an all-reduce: of maxima, of sums, and of what needs the sums first."""

    maxima: int
    sums: int
    second_sums: int = 0

    @property
    def messages(self) -> int:
        return sum(count > 0 for count in self)


def view_exchange(entropy: bool = False) -> Exchange:
    """A scored view: M; S, z_y and E where asked."""
    return Exchange(1, 2 + entropy)


def pair_exchange(jsd: bool = False, targets: bool = False, entropy: bool = False) -> Exchange:
    """Student and teacher: M_s, M_t; S_s, S_t, X, and two target logits and two E where asked.

    A JSD has no X; D and KL(p_s || m) come in a message of their own, both, as the gradient needs the latter.
    """
    return Exchange(2, 2 + (not jsd) + 2 * targets + 2 * entropy, 2 * jsd)


@dataclass(frozen=True)
class Plan:
    """One operation on R ranks: counts of one rank.

    Attributes:
        case: N, H, V and the operation.
        ranks: R >= 1.
    """

    case: Case
    ranks: int
    jsd: bool = False

    @property
    def columns(self) -> int:
        """Columns of a shard, ceil(V / R); the last ones may be padding."""
        return -(-self.case.vocab_size // self.ranks)

    @property
    def is_loss(self) -> bool:
        return self.case.operation != "scoring"

    @property
    def share(self) -> Model:
        """A rank's computation: all rows, its columns."""
        return Model(replace(self.case, vocab_size=self.columns))

    @property
    def flops(self) -> int:
        return self.share.case.flops

    @property
    def blocks(self) -> int:
        """Blocks of rows whose logits exist at a time: a pair's statistics are exchanged for each."""
        split = self.share.rows(DESIGN)
        whole, rest = divmod(self.case.num_rows, split.chunk)
        return whole * -(-split.chunk // split.block) + -(-rest // split.block)

    @property
    def exchanges(self) -> list[tuple[Exchange, int, int]]:
        """(numbers a row of a view or pair, how many of them together, messages of each kind)."""
        found = []
        if self.case.num_scorings:
            found.append((view_exchange(), self.case.num_scorings, 1))
        if self.is_loss:
            # A trainable head goes through `unisd_loss` too (`bench/peers/unisd.py`), without entropies.
            full = self.case.operation == "unisd_loss"
            found.append((pair_exchange(self.jsd, full or not self.case.frozen_head, full), 1, self.blocks))
        return found

    def sent_bytes(self, size: float) -> float:
        """Bytes that a rank sends in a ring for an all-reduce of `size` bytes."""
        return 2 * (self.ranks - 1) / self.ranks * size

    @property
    def statistics_bytes(self) -> float:
        numbers = sum(sum(exchange) * views for exchange, views, _ in self.exchanges)
        return self.sent_bytes(STATISTIC * numbers * self.case.num_rows)

    @property
    def gradient_bytes(self) -> float:
        """The partial dh [N, H], added up in float32."""
        return self.sent_bytes(FLOAT32 * self.case.num_rows * self.case.hidden_size) if self.is_loss else 0.0

    @property
    def statistics_messages(self) -> int:
        return sum(exchange.messages * calls for exchange, _, calls in self.exchanges)

    @property
    def gradient_messages(self) -> int:
        """Messages of dh: ceil(N / rows of a message), however many blocks there are."""
        if not self.is_loss:
            return 0
        rows = GRADIENT_MESSAGE // (FLOAT32 * self.case.hidden_size)
        return -(-self.case.num_rows // (rows // TILE * TILE or rows))

    @property
    def messages(self) -> int:
        return self.statistics_messages + self.gradient_messages

    @property
    def pair_products(self) -> float:
        """Seconds of student's and teacher's product, block by block, at the assumed rates of an H100."""
        return self._pair_products(self.share.rows(DESIGN).block)

    @property
    def halves_cost(self) -> float:
        """Seconds that these products take more in blocks of half the rows, as a second buffer would have them: they
        read the weight twice as often."""
        return self._pair_products(self.share.rows(DESIGN).block // 2) - self.pair_products

    def _pair_products(self, rows: int) -> float:
        product = self.share.product(rows, FLOAT32 * rows * self.columns)
        return 2 * product * self.case.num_rows / rows

    @property
    def head_bytes(self) -> int:
        """A shard of W in 16 bits."""
        return OPERAND * self.columns * self.case.hidden_size

    @property
    def extra_bytes(self) -> float:
        """Bytes that a step adds to W and hidden states at its peak."""
        return self.share.memory(DESIGN)


def headline_plan(head: str, operation: str, ranks: int) -> Plan:
    name, jsd = OPERATIONS[operation]
    return Plan(CASES[f"{head}.{name}.{HEADLINE_ROWS}"], ranks, jsd)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _mega(count: float) -> str:
    """Number in units of 1e6: three digits, none behind the point of a hundred or more."""
    value = count / 1e6
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def exchange_table() -> str:
    exchanges = {
        "scored view": view_exchange(),
        "scored view with entropy": view_exchange(entropy=True),
        "pair, KL": pair_exchange(),
        "pair, KL, with log-probabilities": pair_exchange(targets=True),
        "pair, KL, with log-probabilities and entropies": pair_exchange(targets=True, entropy=True),
        "pair, JSD": pair_exchange(jsd=True),
        "pair, JSD, with log-probabilities and entropies": pair_exchange(jsd=True, targets=True, entropy=True),
    }
    titles = ["what is exchanged", "maxima", "sums", "sums of a further message", "messages"]
    return _table(titles, ([name, *map(str, numbers), str(numbers.messages)] for name, numbers in exchanges.items()))


def count_table(head: str) -> str:
    titles = ["operation", "R", "columns", "TFLOP", "statistics, MB", "dh, MB", "messages", "W, MB", "extra, MB"]

    def row(operation: str, ranks: int) -> list[str]:
        plan = headline_plan(head, operation, ranks)
        sent = [_mega(plan.statistics_bytes), _mega(plan.gradient_bytes), str(plan.messages)]
        held = [_mega(plan.head_bytes), _mega(plan.extra_bytes)]
        return [operation, str(ranks), str(plan.columns), f"{plan.flops / 1e12:.3g}", *sent, *held]

    return _table(titles, (row(operation, ranks) for operation in OPERATIONS for ranks in RANKS))


def time_table() -> str:
    """What messages take beside the products, by assumed rates."""
    titles = ["head", "R", "pair's products, ms", "statistics, ms", "halves, ms more"]
    titles += [f"dh at {ring / 1e9:.0f} GB/s, ms" for ring in RINGS]

    def row(head: str, ranks: int) -> list[str]:
        plan = headline_plan(head, "forward KL", ranks)
        seconds = [plan.pair_products, LATENCY * plan.statistics_messages, plan.halves_cost]
        seconds += [plan.gradient_bytes / ring for ring in RINGS]
        return [head, str(ranks), *(f"{1e3 * each:.2g}" for each in seconds)]

    return _table(titles, (row(head, ranks) for head in HEADS for ranks in RANKS))


def report() -> str:
    parts = ["Numbers a row:", exchange_table()]
    for head in HEADS:
        parts += [f"{head}, N = {HEADLINE_ROWS}; a rank's products, what it sends, what it holds:", count_table(head)]
    parts += [f"forward KL, N = {HEADLINE_ROWS}; times by assumed rates:", time_table()]
    return "\n\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    command_parser("tensor-parallel", __doc__).parse_args(arguments)
    print(report())
    return 0
