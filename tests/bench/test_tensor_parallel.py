"""The counts of docs/tensor-parallel.md: formulas, what losses on slices really send, what the page says of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bench import cases as bench_cases
from bench.cases import CASES
from bench.peers import unisd
from bench.studies import tensor_parallel
from bench.studies.tensor_parallel import (
    DESIGN,
    HEADS,
    OPERATIONS,
    RANKS,
    Plan,
    headline_plan,
    pair_exchange,
    report,
    view_exchange,
)
from tests.distributed.ranks import Rank, counted, run
from tests.distributed.slices import limits, sliced
from tests.support import make_problem
from unisd_kernels import LMHead, linear_divergence, linear_logprobs
from unisd_kernels.backends import engine, hidden_sum
from unisd_kernels.backends.base import NeedsGrad
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.chunked_divergence import ChunkedDivergence
from unisd_kernels.heads.shard import VocabShard

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tensor-parallel.md"
N, H, V = 8192, 4096, 128256
LENGTHS, WIDTH, COLUMNS = (3, 4), 6, 101
CPU = torch.device("cpu")


def sent(ranks: int, rank: Rank) -> float:
    """Bytes that a rank of a ring sends for the all-reduces it called."""
    return sum(2 * (ranks - 1) / ranks * message.bytes for message in rank.messages if message.kind != "gather")


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_real_losses_send_what_the_formulas_say(operation, ranks):
    """The operations of the benchmarks on a small head: bytes and messages, counted around the collectives; ranks are
    threads."""
    name, jsd = OPERATIONS[operation]
    case = CASES[f"llama3.1-8b.{name}.8192"]
    case = replace(case, num_rows=sum(LENGTHS), hidden_size=WIDTH, vocab_size=COLUMNS, dtype=torch.float32)
    problem = make_problem(
        lengths=LENGTHS,
        hidden_size=WIDTH,
        vocab_size=COLUMNS,
        num_auxiliary=case.num_auxiliary,
        negative=case.operation == "unisd_loss",
        frozen_head=case.frozen_head,
        token_weights=not case.frozen_head,
        shared_head=True,
        dtype=torch.float32,
    ).to(torch.float32)
    step = unisd.build(case, 0.5 if jsd else 0.0, CPU)

    def on(group: Rank) -> None:
        own = sliced(problem, group.rank(), group, limits(COLUMNS, ranks))
        group.messages.clear()  # of the heads, which are made once
        if own.token_weights is None:
            own = replace_weights(own)
        step(own)

    _, group = run(ranks, on)
    plan = Plan(case, ranks, jsd)
    assert plan.blocks == 1
    for rank in group:
        assert rank.messages == group[0].messages
        assert len(rank.messages) == plan.messages
        assert sent(ranks, rank) == pytest.approx(plan.statistics_bytes + plan.gradient_bytes, rel=1e-12)
        statistics = [message for message in rank.messages if message.dtype == torch.float64]
        assert all(message.shape[-1] % case.num_rows == 0 for message in statistics)
        # The hidden gradient, once and in float32, on its way meanwhile.
        gradients = [message for message in rank.messages if message.dtype == torch.float32]
        assert [message.shape for message in gradients] == [(case.num_rows, WIDTH)] * plan.is_loss
        assert {message.kind for message in gradients} <= {"started sum"}


@pytest.mark.parametrize("rows", [1, 2, 3, 200, 300, 1000])
@pytest.mark.parametrize("num_rows", [1, 6, 500])
def test_the_hidden_gradient_goes_out_in_as_many_messages_as_the_formula_says(monkeypatch, rows, num_rows):
    """With a limit so small that there are many; 200 and 300 rows are one and two tiles."""
    limit = rows * WIDTH * 4
    monkeypatch.setattr(hidden_sum, "MESSAGE_BYTES", limit)
    monkeypatch.setattr(tensor_parallel, "GRADIENT_MESSAGE", limit)
    case = replace(CASES["llama3.1-8b.kl.8192"], num_rows=num_rows, hidden_size=WIDTH, vocab_size=COLUMNS)
    problem = make_problem(
        lengths=(num_rows,), hidden_size=WIDTH, vocab_size=COLUMNS, frozen_head=True, shared_head=True
    )
    problem = problem.to(torch.float32)

    def on(group: Rank) -> list[int]:
        own = sliced(problem, group.rank(), group, limits(COLUMNS, 2))
        group.messages.clear()
        linear_divergence(*list(own.arguments().values())[:4])
        return [message.bytes for message in group.messages if message.kind == "started sum"]

    found, _ = run(2, on)
    assert found[0] == found[1]
    assert len(found[0]) == Plan(case, 2).gradient_messages
    assert sum(found[0]) == 4 * num_rows * WIDTH
    assert max(found[0]) <= limit


def replace_weights(problem):
    """The random upstream weights of the per-token benchmark."""
    return type(problem)(**problem.arguments() | {"token_weights": torch.rand(problem.num_rows)})


def test_numbers_a_row_of_each_exchange():
    """The public operations by themselves, entropies too."""
    problem = make_problem(lengths=LENGTHS, vocab_size=COLUMNS)
    rows = problem.num_rows

    def on(group: Rank) -> None:
        own = sliced(problem, group.rank(), group, limits(COLUMNS, 2))
        with torch.no_grad():
            for exchange, call in (
                (view_exchange(), lambda: linear_logprobs(own.student_hidden, own.student_head, own.target_ids)),
                (
                    view_exchange(entropy=True),
                    lambda: linear_logprobs(own.student_hidden, own.student_head, own.target_ids, return_entropy=True),
                ),
                (pair_exchange(), lambda: linear_divergence(*list(own.arguments().values())[:4])),
                (pair_exchange(jsd=True), lambda: linear_divergence(*list(own.arguments().values())[:4], beta=0.3)),
            ):
                group.messages.clear()
                call()
                assert [torch.Size(m.shape).numel() // rows for m in group.messages] == [n for n in exchange if n]
                assert counted(group)["maximum"] == 1

    run(2, on)


def test_messages_go_with_the_blocks():
    """Student's and teacher's statistics once a chunk of rows; dh once, as it is small."""
    problem = make_problem(lengths=(16, 14), vocab_size=64).to(torch.float64)

    def on(group: Rank) -> int:
        own = sliced(problem, group.rank(), group, limits(64, 2))
        group.messages.clear()
        divergence = linear_divergence(
            own.student_hidden, own.student_head.detach(), own.teacher_hidden, own.teacher_head, workspace_bytes=5120
        )
        divergence.sum().backward()
        return len(group.messages)

    # 5120 bytes are 10 rows of two views of 32 columns in float64.
    assert run(2, on)[0] == [2 * 3 + 1] * 2


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ranks", RANKS)
def test_blocks_are_those_of_the_gpu_design(head, ranks):
    """On every rank, also on the last, whose slice may be short."""
    plan = Plan(replace(CASES[f"{head}.kl.8192"], vocab_size=bench_cases.HEADS[head][1] - 5), ranks)
    case, bounds = plan.case, limits(plan.case.vocab_size, ranks)
    pairs = tuple(pairwise(bounds))
    for rank in (0, ranks - 1):
        start, end = pairs[rank]
        shard = VocabShard(SimpleNamespace(), rank, pairs, case.vocab_size)
        hidden, weight = (
            torch.empty(rows, case.hidden_size, dtype=case.dtype, device="meta") for rows in (N, end - start)
        )
        head_of = replace(Projection.of(hidden, LMHead(weight), 0.7), shard=shard)
        workspace = engine.default_workspace_bytes(torch.device("cuda"))
        walk = ChunkedDivergence(head_of, head_of, 0.0, workspace, NeedsGrad(True))
        split = plan.share.rows(DESIGN)
        assert (walk.chunk_rows, walk.block_rows) == (split.chunk, split.block)


def test_bytes_and_messages_by_hand():
    """Llama's head on 8 ranks; 16-bit operands, float64 statistics, float32 partial sums."""

    def total(operation: str) -> float:
        plan = headline_plan("llama3.1-8b", operation, 8)
        return plan.statistics_bytes + plan.gradient_bytes

    assert total("scoring") == 2 * 7 / 8 * 8 * 3 * N
    assert total("forward KL") == 2 * 7 / 8 * N * (8 * 5 + 4 * H)
    assert total("JSD") == 2 * 7 / 8 * N * (8 * 6 + 4 * H)
    assert total("forward KL, trainable head") == 2 * 7 / 8 * N * (8 * 7 + 4 * H)
    assert total("UniSD*, K = 3") == 2 * 7 / 8 * N * (8 * (4 * 3 + 9) + 4 * H)
    blocks = headline_plan("llama3.1-8b", "forward KL", 8).blocks
    # 1024 rows of dh are 16 MiB.
    assert headline_plan("llama3.1-8b", "forward KL", 8).gradient_messages == 8
    assert headline_plan("llama3.1-8b", "forward KL", 8).messages == 2 * blocks + 8
    assert headline_plan("llama3.1-8b", "UniSD*, K = 3", 8).messages == 2 + 2 * blocks + 8
    assert headline_plan("llama3.1-8b", "scoring", 8).gradient_messages == 0
    jsd = headline_plan("llama3.1-8b", "JSD", 8)
    assert jsd.messages == 3 * jsd.blocks + 8
    # 12 tiles of 128 rows of Gemma's 2560 numbers are 15.7 MB.
    assert headline_plan("gemma3-4b", "forward KL", 8).gradient_messages == 6


def test_blocks_cover_the_rows():
    """Whole chunks of whole and cut blocks, and what is left."""
    for head in HEADS:
        for operation in OPERATIONS:
            for num_rows in (1, 500, 8192, 8193):
                plan = headline_plan(head, operation, 2)
                plan = replace(plan, case=replace(plan.case, num_rows=num_rows))
                split, blocks = plan.share.rows(DESIGN), 0
                for start in range(0, num_rows, split.chunk):
                    blocks += len(range(start, min(start + split.chunk, num_rows), split.block))
                assert plan.blocks == blocks


def test_products_and_memory_of_a_rank():
    """A share of the columns, the last one padded; W, the workspace, and float32 gradients."""
    plan = headline_plan("llama3.1-8b", "forward KL", 8)
    assert plan.flops == 2 * 3 * N * H * V // 8
    assert plan.head_bytes == 2 * H * V // 8
    assert plan.extra_bytes == plan.share.rows(DESIGN).held_bytes + 4 * N * H
    trainable = headline_plan("llama3.1-8b", "forward KL, trainable head", 8)
    assert trainable.extra_bytes == trainable.share.rows(DESIGN).held_bytes + 4 * (N * H + V * H // 8)
    # Gemma's 262208 columns are 64 x 4097; one more makes 4098 of every shard.
    gemma = headline_plan("gemma3-4b", "forward KL", 64)
    one_more = replace(gemma, case=replace(gemma.case, vocab_size=gemma.case.vocab_size + 1))
    assert (gemma.columns, one_more.columns) == (4097, 4098)


def test_one_rank_sends_nothing():
    plan = Plan(headline_plan("llama3.1-8b", "forward KL", 2).case, 1)
    assert plan.statistics_bytes == plan.gradient_bytes == 0
    assert plan.flops == plan.case.flops


def page() -> str:
    return PAGE.read_text()


def prose() -> str:
    return " ".join(page().split())


def test_the_tables_in_the_documentation_are_the_generated_ones(capsys):
    begin, end = "<!-- generated: begin -->\n", "<!-- generated: end -->"
    assert page().split(begin)[1].split(end)[0].strip() == report().strip()
    assert tensor_parallel.main([]) == 0
    assert capsys.readouterr().out.strip() == report().strip()


def test_what_the_page_says_of_the_numbers():
    few, many = (headline_plan("llama3.1-8b", "forward KL", ranks) for ranks in (2, 64))
    assert f"sends {few.gradient_bytes / 1e6:.0f} MB of dh at R = 2 and {many.gradient_bytes / 1e6:.0f} MB" in prose()
    assert f"fall from {few.flops / 1e12:.3g} to {many.flops / 1e12:.3g} TFLOP" in prose()
    plans = [headline_plan(head, operation, ranks) for head in HEADS for operation in OPERATIONS for ranks in RANKS]
    shares = [plan.statistics_bytes / (plan.statistics_bytes + plan.gradient_bytes) for plan in plans if plan.is_loss]
    assert f"at most {max(shares):.1%} of a loss's bytes" in prose()
    sharded, whole = (headline_plan("llama3.1-8b", "forward KL, trainable head", ranks) for ranks in (8, 1))
    held = [(plan.head_bytes + plan.extra_bytes) / 1e9 for plan in (sharded, whole)]
    assert f"holds {held[0]:.1f} GB in place of {held[1]:.1f} GB" in prose()
    assert f"{headline_plan('gemma3-4b', 'JSD', 2).messages} for Gemma's JSD at R = 2" in prose()
    gemma, llama = (headline_plan(head, "forward KL", 2) for head in reversed(HEADS))
    assert f"(Gemma: {1e3 * gemma.halves_cost:.0f} ms for {25e-3 * gemma.statistics_messages:.2g})" in prose()
    assert llama.halves_cost > tensor_parallel.LATENCY * llama.statistics_messages
    assert (llama.gradient_messages, gemma.gradient_messages) == (8, 6)
    eights = [headline_plan(head, "forward KL", 8) for head in HEADS]
    saved, products = (
        [25e-3 * plan.statistics_messages for plan in eights],
        [1e3 * plan.flops / plan.share.given.product_flops for plan in eights],
    )
    assert f"{saved[0]:.1f} to {saved[1]:.1f} ms beside products of {products[0]:.1f} to {products[1]:.1f}" in prose()
    assert all(plan.gradient_bytes / 400e9 < 1e-3 * ms / 7 for plan, ms in zip(eights, products, strict=True))
    last = {plan.messages for plan in plans if plan.ranks == 64 and plan.case.operation == "divergence"}
    assert f"{min(last)} to {max(last)} for a loss over one view pair at R = 64" in prose()
