"""`python -m bench.tensor_parallel`: the losses under tensor parallelism, from counts alone. Nothing here is run.

The weight W [V, H] of the head lies in R shards of ceil(V / R) columns of the vocabulary, one a rank. The package has
no such mode: this is a design study. The layouts:

vocabulary  Each rank makes the logits of its shard, for all N rows. Statistics of the rows are exchanged:

                m = max_j z_j                                       a first all-reduce (max)
                S = sum_j e^(z_j - m),  z_y - m  (from the rank that has column y),
                E = sum_j e^(z_j - m) (z_j - m)                     a second one (sum)
                logp(y) = z_y - m - log S,   entropy = log S - E / S

            and of a pair of student and teacher, with the same two all-reduces,

                X = sum_j e^(z_t - m_t) ((z_t - m_t) - (z_s - m_s))
                KL(p_t || p_s) = X / S_t - log S_t + log S_s

            A rank takes the sums relative to the maximum of its own shard, in one pass, and rescales them once it has
            the common one. A JSD needs S_s and S_t of all ranks before its sums KL(p_t || m) and KL(p_s || m): a third
            all-reduce. Then dh [N, H] is a sum of R partial ones, and dW stays where it is.
logits      The shards' logits are gathered, float32 [N, V] a view, and every rank computes all statistics.
head        W is gathered in 16 bits, and each rank has ceil(N / R) rows; dW is reduce-scattered.
replicated  Every rank has W and ceil(N / R) rows; a trainable head's dW is all-reduced.

Bytes a rank sends in a ring, for a tensor of S bytes: all-reduce 2 (R - 1) / R S, all-gather and reduce-scatter
(R - 1) / R S. A time is that of `bench.expected` for the rank's share, plus for every collective a latency and
bytes / bandwidth. Nothing overlaps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from bench.cases import CASES, HEADLINE_ROWS, Case
from bench.expected import FLOAT32, OPERAND, Assumptions, Model, _spans
from unisd_kernels.ops import loss_autograd

Layout = Literal["vocabulary", "logits", "head", "replicated"]
LAYOUTS: tuple[Layout, ...] = ("vocabulary", "logits", "head", "replicated")
# Those that do not keep all of W on every rank.
SHARDED: tuple[Layout, ...] = ("vocabulary", "logits", "head")
RANKS = (2, 4, 8, 16, 32, 64)
HEADS = ("llama3.1-8b", "gemma3-4b")
# Title of an operation -> (operation of `bench.cases`, whether its divergence is the JSD).
OPERATIONS = {
    "forward KL": ("kl", False),
    "JSD": ("kl", True),
    "forward KL, trainable head": ("kl_trainable", False),
    "scoring": ("scoring", False),
    "UniSD*, K = 3": ("unisd_star", False),
}
FACTORS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Links:
    """Data sheets and assumptions; none of these numbers is measured.

    Attributes:
        inside: bytes/s a GPU sends within a node: NVLink 4, 900 GB/s for both directions.
        across: bytes/s a GPU sends to another node: one adapter of 400 Gb/s.
        node: GPUs of a node, each with an adapter.
        rings: into which a collective across nodes is divided. Each leaves a node through another adapter, so that
            `rings` adapters carry what crosses; with one ring everything passes one adapter.
        inside_latency, across_latency: seconds a collective, whatever its size and R.
    """

    inside: float = 450e9
    across: float = 50e9
    node: int = 8
    rings: int = 8
    inside_latency: float = 10e-6
    across_latency: float = 25e-6

    def bandwidth(self, ranks: int) -> float:
        """Bytes/s that divide what a rank sends."""
        return self.inside if ranks <= self.node else min(self.inside, self.rings * self.across)

    def latency(self, ranks: int) -> float:
        return self.inside_latency if ranks <= self.node else self.across_latency


class Exchange(NamedTuple):
    """Numbers a row in the vocabulary layout: of the maxima, of the sums, and of what needs the latter first."""

    maxima: int
    sums: int
    second_sums: int = 0

    @property
    def rounds(self) -> int:
        return 2 + (self.second_sums > 0)


def view_exchange(entropy: bool = False) -> Exchange:
    """Of one scored view: m; S, z_y - m and E where asked."""
    return Exchange(1, 2 + entropy)


def pair_exchange(jsd: bool = False, targets: bool = False, entropy: bool = False) -> Exchange:
    """Of student and teacher: m_s, m_t; S_s, S_t, X, and two target logits and two E where asked.

    A JSD has no X; KL(p_t || m) and KL(p_s || m) come in a round of their own, both, as the gradient needs the latter.
    """
    return Exchange(2, 2 + (not jsd) + 2 * targets + 2 * entropy, 2 * jsd)


@dataclass(frozen=True)
class Collective:
    """Equal collectives in `calls` parts, together on a tensor of `elements`: the reduced or the gathered one."""

    what: str
    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    elements: int
    element_bytes: int
    calls: int = 1

    def sent_elements(self, ranks: int) -> float:
        """Of a rank, in a ring; the mean over the ranks where R does not divide the tensor."""
        return FACTORS[self.kind] * (ranks - 1) / ranks * self.elements

    def sent_bytes(self, ranks: int) -> float:
        return self.element_bytes * self.sent_elements(ranks)


@dataclass(frozen=True)
class Plan:
    """One operation in one layout on R ranks: counts a rank, and times in seconds.

    Attributes:
        case: N, H, V and the operation.
        split_rows: the backbone leaves N / R rows of every hidden state on a rank and takes as many of dh (sequence
            parallelism), in place of all N on every rank.
        reduced_bytes: of an element of the partial dh on the wire.
    """

    case: Case
    layout: Layout
    ranks: int
    jsd: bool = False
    split_rows: bool = False
    reduced_bytes: int = FLOAT32
    given: Assumptions = Assumptions()
    links: Links = Links()

    @property
    def by_rows(self) -> bool:
        """Each rank has some rows and the whole vocabulary, rather than all rows and some of the vocabulary."""
        return self.layout in ("head", "replicated")

    @property
    def columns(self) -> int:
        """Of a shard; the last ones may be padding."""
        return -(-self.case.vocab_size // self.ranks)

    @property
    def rows(self) -> int:
        """Of a rank; in the last ones some may be padding."""
        return -(-self.case.num_rows // self.ranks)

    @property
    def is_loss(self) -> bool:
        return self.case.operation != "scoring"

    @property
    def design(self) -> str:
        return "chunked" if self.jsd else "fused"

    @property
    def share(self) -> Model:
        """What a rank computes."""
        local = {"num_rows": self.rows} if self.by_rows else {"vocab_size": self.columns}
        return Model(replace(self.case, **local), self.given)

    @property
    def flops(self) -> float:
        case = self.share.case
        return 2.0 * case.num_products * case.num_rows * case.hidden_size * case.vocab_size

    @property
    def blocks(self) -> int:
        """Of rows whose logits exist at a time: student's and teacher's statistics are exchanged for each."""
        split = self.share.rows(self.design)
        return sum(len(_spans(rows, split.block)) for rows in _spans(self.share.case.num_rows, split.chunk))

    def statistics(self) -> list[Collective]:
        """Of the vocabulary layout: all scored views at once, then student and teacher a block at a time."""
        case, found = self.case, []
        if case.num_scorings:
            found += self._exchanged("views", case.num_scorings, view_exchange(), calls=1)
        if self.is_loss:
            full = case.operation == "unisd_loss"
            found += self._exchanged("pair", 1, pair_exchange(self.jsd, full, full), calls=self.blocks)
        return found

    def _exchanged(self, what: str, views: int, numbers: Exchange, calls: int) -> list[Collective]:
        return [
            Collective(f"{what}: {name}", "all-reduce", views * count * self.case.num_rows, FLOAT32, calls)
            for name, count in zip(Exchange._fields, numbers)
            if count
        ]

    def hidden(self) -> list[Collective]:
        """Hidden states in, dh out."""
        case, padded = self.case, self.ranks * self.rows * self.case.hidden_size
        if self.by_rows:
            gathered = self.is_loss and not self.split_rows
            return [Collective("dh", "all-gather", padded, OPERAND)] if gathered else []
        if not self.split_rows:
            whole = case.num_rows * case.hidden_size
            return [Collective("dh", "all-reduce", whole, self.reduced_bytes)] if self.is_loss else []
        views = case.num_forward_products
        found = [Collective("hidden states", "all-gather", views * padded, OPERAND, views)]
        return found + ([Collective("dh", "reduce-scatter", padded, self.reduced_bytes)] if self.is_loss else [])

    def results(self) -> list[Collective]:
        """Of layouts by rows: what the whole batch decides, and [N] results where every rank is to have them."""
        case, padded = self.case, self.ranks * self.rows
        if not self.by_rows:
            return []
        if case.operation == "unisd_loss":
            # The disagreements, whose quantile scales the weights; divergence, contrastive and feature term.
            scalars = Collective("terms of the loss", "all-reduce", 3, FLOAT32)
            return [Collective("disagreement", "all-gather", padded, FLOAT32), scalars]
        # A log-probability and a log-sum-exp, or a divergence.
        numbers = 1 if self.is_loss else 2
        return [] if self.split_rows else [Collective("results", "all-gather", numbers * padded, FLOAT32)]

    def weights(self) -> list[Collective]:
        """W in, dW out."""
        padded, trainable = self.ranks * self.columns * self.case.hidden_size, not self.case.frozen_head
        if self.layout == "head":
            found = [Collective("W", "all-gather", padded, OPERAND)]
            return found + ([Collective("dW", "reduce-scatter", padded, FLOAT32)] if trainable else [])
        whole = self.case.vocab_size * self.case.hidden_size
        return [Collective("dW", "all-reduce", whole, FLOAT32)] if trainable and self.layout == "replicated" else []

    def logits(self) -> list[Collective]:
        """Of the logits layout."""
        views = self.case.num_forward_products
        return [
            Collective("logits", "all-gather", views * self.case.num_rows * self.ranks * self.columns, FLOAT32, views)
        ]

    def collectives(self) -> list[Collective]:
        if self.ranks == 1:
            return []
        found = self.hidden() + self.results() + self.weights()
        extra = {"vocabulary": self.statistics, "logits": self.logits}.get(self.layout)
        return found + (extra() if extra else [])

    @property
    def calls(self) -> int:
        return sum(part.calls for part in self.collectives())

    @property
    def wire_bytes(self) -> float:
        return sum(part.sent_bytes(self.ranks) for part in self.collectives())

    @property
    def wire_seconds(self) -> float:
        return self.calls * self.links.latency(self.ranks) + self.wire_bytes / self.links.bandwidth(self.ranks)

    @property
    def compute_seconds(self) -> float:
        """Products and passes over logits as in `bench.expected`; then dh is scaled and rounded: 6 bytes an element."""
        own = self._logits_seconds() if self.layout == "logits" else self._share_seconds()
        rounded = self.share.case.num_rows * self.case.hidden_size if self.is_loss else 0
        return own + (FLOAT32 + OPERAND) * rounded / self.given.bandwidth

    def _share_seconds(self) -> float:
        """Where few rows are left the auxiliary views are scored as one, as `unisd_kernels/ops/loss_autograd.py` does:
        the weight is then read once for all of them."""
        share, auxiliary = self.share, self.case.num_auxiliary
        whole, stacked = share.seconds(self.design, self.jsd), auxiliary * share.case.num_rows
        if not auxiliary or stacked > loss_autograd._STACKED_ROWS:
            return whole
        return whole - auxiliary * share.scoring + Model(replace(share.case, num_rows=stacked), self.given).scoring

    def _logits_seconds(self) -> float:
        """Products of the shard; statistics of the whole vocabulary, one pass over each view (two for a JSD); the
        gradient of the shard."""
        case, share, rows = self.case, self.share, self.case.num_rows
        local, whole = rows * self.columns, rows * case.vocab_size
        views, passes = case.num_forward_products, case.num_scorings + 2 * (1 + self.jsd) * self.is_loss
        moved = FLOAT32 * passes * whole
        total = views * share.product(rows, FLOAT32 * local)
        if self.is_loss:
            moved += (2 * FLOAT32 + OPERAND) * local
            total += share.product(rows, OPERAND * local)
            if not case.frozen_head:
                total += share.weight_gradient(rows, first=True) + share.weight_gradient_end
        return total + moved / self.given.bandwidth

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.wire_seconds

    @property
    def efficiency(self) -> float:
        """T(1) / (R T(R)), T(1) of one GPU with all of it."""
        return replace(self, layout="replicated", ranks=1).seconds / (self.ranks * self.seconds)

    @property
    def head_bytes(self) -> float:
        """Of W on a rank; the head layout has its shard and the gathered one."""
        held = {"head": (self.ranks + 1) * self.columns, "replicated": self.case.vocab_size}
        return float(OPERAND * self.case.hidden_size * held.get(self.layout, self.columns))

    @property
    def extra_bytes(self) -> float:
        """Beside W and the hidden states, at the peak, as `bench.expected` counts them; the logits layout has
        [N, V] of every tensor."""
        case, share = self.case, self.share
        if self.layout == "logits":
            return self._logits_bytes()
        if not self.is_loss:
            return share.memory(self.design)
        gathered = sum(part.elements * part.element_bytes for part in self.hidden()) if self.by_rows else 0
        if self.layout != "head" or case.frozen_head or self.ranks == 1:
            return share.memory(self.design) + gathered
        # dW of the whole vocabulary, and the rank's part of the sum.
        hidden, weight = (count * case.hidden_size for count in (self.rows, self.ranks * self.columns))
        walk = share.rows(self.design).held_bytes + FLOAT32 * (hidden + weight)
        end = (FLOAT32 + OPERAND) * hidden + FLOAT32 * (weight + weight // self.ranks)
        return max(walk, end) + gathered

    def _logits_bytes(self) -> float:
        case = self.case
        gathered = float(FLOAT32 * case.num_rows * self.ranks * self.columns)
        if not self.is_loss:
            return gathered
        weight = 0 if case.frozen_head else self.columns * case.hidden_size
        gradients = case.num_rows * case.hidden_size + weight
        return 2 * gathered + OPERAND * case.num_rows * self.columns + FLOAT32 * gradients

    @property
    def memory(self) -> float:
        return self.head_bytes + self.extra_bytes


def headline_case(head: str, operation: str, num_rows: int = HEADLINE_ROWS) -> Case:
    return replace(CASES[f"{head}.{OPERATIONS[operation][0]}.{HEADLINE_ROWS}"], num_rows=num_rows)


def headline_plan(head: str, operation: str, layout: Layout, ranks: int, links: Links = Links()) -> Plan:
    return Plan(headline_case(head, operation), layout, ranks, OPERATIONS[operation][1], links=links)


def fastest(plan: Plan, layouts: Iterable[Layout] = LAYOUTS) -> Layout:
    return min(layouts, key=lambda layout: replace(plan, layout=layout).seconds)


def wire_dominates_from(plan: Plan) -> int | None:
    """The least R of `RANKS` at which a rank waits for the wire longer than it computes; None for none of them."""
    for ranks in RANKS:
        at = replace(plan, ranks=ranks)
        if at.wire_seconds > at.compute_seconds:
            return ranks
    return None


def rows_for_the_head(plan: Plan) -> float:
    """N from which gathering W sends fewer bytes than the vocabulary layout (infinity: never), at R ranks.

    Both are linear in N but for the padding of rows; W is the constant.
    """
    points = []
    for rows in (64 * plan.ranks, 128 * plan.ranks):
        at = replace(plan, case=replace(plan.case, num_rows=rows))
        sent = [replace(at, layout=layout).wire_bytes for layout in ("head", "vocabulary")]
        points.append(sent[0] - sent[1])
    slope = (points[1] - points[0]) / (64 * plan.ranks)
    return math.inf if slope >= 0 else 64 * plan.ranks - points[0] / slope


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _mega(count: float) -> str:
    """In units of 1e6: three digits, none behind the point of a hundred or more."""
    value = count / 1e6
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(plan: Plan) -> str:
    return f"{_mega(1e9 * plan.seconds)} ({plan.efficiency:.2f})"


def exchange_table() -> str:
    """Numbers a row of the vocabulary layout."""
    exchanges = {
        "scored view": view_exchange(),
        "scored view with entropy": view_exchange(entropy=True),
        "pair, KL": pair_exchange(),
        "pair, KL, with log-probabilities and entropies": pair_exchange(targets=True, entropy=True),
        "pair, JSD": pair_exchange(jsd=True),
    }
    titles = ["what is exchanged", "maxima", "sums", "sums of a further round", "all-reduces"]
    return _table(titles, ([name, *map(str, numbers), str(numbers.rounds)] for name, numbers in exchanges.items()))


def count_table(head: str) -> str:
    """Of the vocabulary layout."""
    titles = ["operation", "R", "columns", "TFLOP", "statistics, MB", "dh, MB", "collectives", "W, MB", "extra, MB"]

    def row(operation: str, ranks: int) -> list[str]:
        plan = headline_plan(head, operation, "vocabulary", ranks)
        sent = [
            sum(part.sent_bytes(ranks) for part in parts) if parts else 0.0
            for parts in (plan.statistics(), plan.hidden())
        ]
        numbers = [f"{plan.flops / 1e12:.3g}", *map(_mega, sent), str(plan.calls)]
        return [operation, str(ranks), str(plan.columns), *numbers, _mega(plan.head_bytes), _mega(plan.extra_bytes)]

    return _table(titles, (row(operation, ranks) for operation in OPERATIONS for ranks in RANKS))


def layout_table(head: str, ranks: Sequence[int] = (8, 64)) -> str:
    titles = ["operation", "R", *(f"{layout}, sent" for layout in LAYOUTS), *(f"{layout}, held" for layout in LAYOUTS)]

    def row(operation: str, count: int) -> list[str]:
        plans = [headline_plan(head, operation, layout, count) for layout in LAYOUTS]
        sent, held = ([_mega(value) for value in values] for values in zip(*((p.wire_bytes, p.memory) for p in plans)))
        return [operation, str(count), *sent, *held]

    return _table(titles, (row(operation, count) for operation in OPERATIONS for count in ranks))


def time_table(head: str, ranks: Sequence[int] = RANKS, links: Links = Links(), split_rows: bool = False) -> str:
    titles = ["operation", "R", *LAYOUTS, "fastest"]

    def row(operation: str, count: int) -> list[str]:
        plan = replace(headline_plan(head, operation, "vocabulary", count, links), split_rows=split_rows)
        times = [_time(replace(plan, layout=layout)) for layout in LAYOUTS]
        return [operation, str(count), *times, fastest(plan)]

    return _table(titles, (row(operation, count) for operation in OPERATIONS for count in ranks))


def crossing_table() -> str:
    titles = [
        "head",
        "operation",
        *(f"{layout}, {rings}" for rings in ("8 rings", "1 ring") for layout in LAYOUTS),
        "N",
        "N, dh in 16 bits",
        "N, rows split",
    ]

    def row(head: str, operation: str) -> list[str]:
        cells = [head, operation]
        for rings in (8, 1):
            for layout in LAYOUTS:
                least = wire_dominates_from(headline_plan(head, operation, layout, 2, Links(rings=rings)))
                cells.append("-" if least is None else str(least))
        plan = headline_plan(head, operation, "vocabulary", 8)
        for changed in (plan, replace(plan, reduced_bytes=OPERAND), replace(plan, split_rows=True)):
            least_rows = rows_for_the_head(changed)
            cells.append("above 1e6" if least_rows > 1e6 else f"{least_rows:.0f}")
        return cells

    return _table(titles, (row(head, operation) for head in HEADS for operation in OPERATIONS))


def report(links: Links = Links()) -> str:
    given = Assumptions()
    across = replace(links, rings=1)
    beyond = [ranks for ranks in RANKS if ranks > links.node]
    parts = [
        f"Products at {given.product_flops / 1e12:.0f} TFLOP/s, {given.bandwidth / 1e9:.0f} GB/s; links of "
        f"{links.inside / 1e9:.0f} GB/s within {links.node} GPUs, {links.across / 1e9:.0f} GB/s a GPU between nodes,\n"
        f"{1e6 * links.inside_latency:.0f} and {1e6 * links.across_latency:.0f} us a collective. N = {HEADLINE_ROWS}. "
        "Everything is a count; nothing is measured.",
        "Vocabulary layout, numbers a row:",
        exchange_table(),
    ]
    for head in HEADS:
        parts += [
            f"{head}, vocabulary layout, a rank's share (MB sent, MB held):",
            count_table(head),
            f"{head}, layouts side by side, MB a rank (held: W and extra):",
            layout_table(head),
            f"{head}, ms (parallel efficiency), {links.rings} rings between nodes:",
            time_table(head, links=links),
            f"{head}, the same with one ring between nodes:",
            time_table(head, beyond, across),
            f"{head}, hidden states and dh split by rows, {links.rings} rings:",
            time_table(head, (8, 64), links, split_rows=True),
        ]
    parts += [
        "From which R the wire takes longer than the arithmetic (- for none up to 64), and from which N gathering W "
        "sends fewer bytes than the vocabulary layout:",
        crossing_table(),
    ]
    return "\n\n".join(parts)


def main() -> None:
    default = Links()
    parser = argparse.ArgumentParser(
        prog="python -m bench.tensor_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inside", type=float, default=default.inside, help="bytes/s a GPU sends within a node")
    parser.add_argument("--across", type=float, default=default.across, help="bytes/s a GPU sends to another node")
    parser.add_argument("--inside-latency", type=float, default=default.inside_latency, help="seconds a collective")
    parser.add_argument("--across-latency", type=float, default=default.across_latency, help="seconds a collective")
    options = parser.parse_args()
    print(report(Links(**vars(options))))


if __name__ == "__main__":
    main()
