"""The counts behind docs/tensor-parallel.md: a float64 problem in R shards, and what the page says of the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.studies import tensor_parallel
from bench.studies.tensor_parallel import (
    HEADS,
    OPERATIONS,
    RANKS,
    Exchange,
    Plan,
    headline_plan,
    pair_exchange,
    report,
    view_exchange,
)
from unisd_kernels import LMHead, reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tensor-parallel.md"
N, H, V = 8192, 4096, 128256
ROWS, WIDTH, TAU = 7, 5, 0.7
Parts = list[torch.Tensor]


class Ring:
    """R ranks; counts messages, and the elements that all of them send together."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.messages, self.sent = ranks, 0, 0

    def all_reduce(self, parts: Parts, combine: Callable[..., torch.Tensor] = torch.add) -> torch.Tensor:
        """Piece i starts on rank i, and every rank on its way adds its own; then each goes round once more."""
        pieces, done = [list(part.flatten().tensor_split(self.ranks)) for part in parts], []
        for i in range(self.ranks):
            running = pieces[i][i]
            for step in range(1, self.ranks):
                running = combine(pieces[(i + step) % self.ranks][i], running)
            done.append(running)
        self.messages += 1
        self.sent += sum(2 * (self.ranks - 1) * piece.numel() for piece in done)
        return torch.cat(done).view_as(parts[0])


class Shards:
    """The layout as the page describes it, on one block of rows."""

    def __init__(self, ranks: int, columns: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(ranks + columns)
        self.student, self.teacher, self.weight = (
            torch.randn(size, WIDTH, generator=generator, dtype=torch.float64) for size in (ROWS, ROWS, columns)
        )
        self.weight *= scale
        self.targets = torch.randint(0, columns, (ROWS,), generator=generator)
        self.ring, width = Ring(ranks), -(-columns // ranks)
        self.limits = [min(rank * width, columns) for rank in range(ranks + 1)]
        self.parts = [self.weight[a:b] for a, b in pairwise(self.limits)]

    def logits(self, hidden: torch.Tensor) -> Parts:
        """[N, V_r] of each shard; a shard may have no column."""
        return [hidden @ weight.T / TAU for weight in self.parts]

    def maxima(self, *views: Parts) -> tuple[list[Parts], torch.Tensor]:
        """Each view's maxima by shard (-inf: no column), and the common ones [views, N], by one message."""
        local = [[z.amax(-1) if z.shape[1] else z.new_full((ROWS,), -math.inf) for z in shares] for shares in views]
        return local, self.ring.all_reduce([torch.stack(tops) for tops in zip(*local, strict=True)], torch.maximum)

    def target(self, rank: int, logits: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        """z_y - m where the shard has column y, else 0; [N]."""
        hot = self.targets.unsqueeze(-1) == torch.arange(self.limits[rank], self.limits[rank + 1])
        return torch.where(hot, logits - top.unsqueeze(-1), 0.0).sum(-1)

    def score(self) -> torch.Tensor:
        """Log-probability, log-sum-exp and entropy, [3, N]."""
        logits = self.logits(self.student)
        (tops,), (top,) = self.maxima(logits)
        sums = []
        for rank, (z, own) in enumerate(zip(logits, tops, strict=True)):
            total, entropy = view_sums(z, own, own - top)
            sums.append(torch.stack([total, self.target(rank, z, top), entropy]))
        total, target, entropy = self.ring.all_reduce(sums)
        return torch.stack([target - total.log(), top + total.log(), total.log() - entropy / total])

    def pair(self, jsd: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """D [N], and the gradient of its sum [N, H]."""
        student, teacher = self.logits(self.student), self.logits(self.teacher)
        (own_s, own_t), (top_s, top_t) = self.maxima(student, teacher)
        sums = []
        for z_s, z_t, m_s, m_t in zip(student, teacher, own_s, own_t, strict=True):
            (total_s, _), (total_t, _) = view_sums(z_s, m_s, m_s - top_s), view_sums(z_t, m_t, m_t - top_t)
            u_s, u_t = z_s - m_s.unsqueeze(-1), z_t - m_t.unsqueeze(-1)
            moved = (m_t - top_t - (m_s - top_s)).nan_to_num() * u_t.exp().sum(-1)
            cross = (m_t - top_t).exp() * ((u_t.exp() * (u_t - u_s)).sum(-1) + moved)
            sums.append(torch.stack([total_s, total_t] if jsd else [total_s, total_t, cross]))
        total_s, total_t, *cross_sum = self.ring.all_reduce(sums)
        log_s = [z - (top_s + total_s.log()).unsqueeze(-1) for z in student]
        log_t = [z - (top_t + total_t.log()).unsqueeze(-1) for z in teacher]
        if jsd:
            logs = [(s, t, torch.logaddexp(s, t) + math.log(0.5)) for s, t in zip(log_s, log_t, strict=True)]
            kls = [torch.stack([(t.exp() * (t - m)).sum(-1), (s.exp() * (s - m)).sum(-1)]) for s, t, m in logs]
            of_teacher, of_student = self.ring.all_reduce(kls)
            divergence = 0.5 * (of_teacher + of_student)
            gradients = [0.5 * s.exp() * (s - m - of_student.unsqueeze(-1)) for s, _, m in logs]
        else:
            divergence = cross_sum[0] / total_t - total_t.log() + total_s.log()
            gradients = [s.exp() - t.exp() for s, t in zip(log_s, log_t, strict=True)]
        partial = [gradient @ weight / TAU for gradient, weight in zip(gradients, self.parts, strict=True)]
        return divergence, self.ring.all_reduce(partial)


def view_sums(logits: torch.Tensor, own: torch.Tensor, move: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S and E relative to the shard's maximum, then to the common one, which is `-move` higher; [N] each."""
    shifted = logits - own.unsqueeze(-1)
    total, entropy = shifted.exp().sum(-1), (shifted.exp() * shifted).sum(-1)
    return move.exp() * total, move.exp() * (entropy + move.nan_to_num(neginf=0.0) * total)


def check_exchange(ring: Ring, exchange: Exchange, gradient: bool) -> None:
    numbers = ROWS * sum(exchange) + gradient * ROWS * WIDTH
    assert ring.messages == exchange.messages + gradient
    # All ranks together send R times what one does.
    assert ring.sent == 2 * (ring.ranks - 1) * numbers


SIZES = [(2, 23), (4, 23), (8, 23), (8, 9)]  # 9 columns on 8 ranks: some have none


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize(("ranks", "columns"), SIZES)
def test_scores_of_shards_are_those_of_the_whole(ranks, columns, scale):
    """Also of logits of several hundred, whose exponentials overflow, in shards of which some underflow whole."""
    shards = Shards(ranks, columns, scale)
    assert torch.cat(shards.logits(shards.student), 1).exp().isinf().any() == (scale > 1)
    found = shards.score()
    wanted = reference.linear_logprobs(shards.student, LMHead(shards.weight), shards.targets, TAU, return_entropy=True)
    torch.testing.assert_close(found, torch.stack([wanted.logprobs, wanted.logsumexp, wanted.entropy]))
    check_exchange(shards.ring, view_exchange(entropy=True), gradient=False)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("jsd", [False, True])
@pytest.mark.parametrize(("ranks", "columns"), SIZES)
def test_divergences_of_shards_are_those_of_the_whole(ranks, columns, jsd, scale):
    shards = Shards(ranks, columns, scale)
    divergence, gradient = shards.pair(jsd)
    student, head = shards.student.clone().requires_grad_(), LMHead(shards.weight)
    wanted = reference.linear_divergence(student, head, shards.teacher, head, 0.5 * jsd, TAU)
    torch.testing.assert_close(divergence, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), student)[0])
    check_exchange(shards.ring, pair_exchange(jsd), gradient=True)


def test_bytes_and_messages_by_hand():
    """Llama's head on 8 ranks; 16-bit operands, float32 statistics and partial sums."""

    def sent(operation: str) -> float:
        plan = headline_plan("llama3.1-8b", operation, 8)
        return plan.statistics_bytes + plan.gradient_bytes

    assert sent("scoring") == 2 * 7 / 8 * 4 * 3 * N
    assert sent("forward KL") == 2 * 7 / 8 * 4 * N * (5 + H)
    assert sent("JSD") == 2 * 7 / 8 * 4 * N * (6 + H)
    assert sent("forward KL, trainable head") == sent("forward KL")
    assert sent("UniSD*, K = 3") == 2 * 7 / 8 * 4 * N * (4 * 3 + 9 + H)
    blocks = headline_plan("llama3.1-8b", "forward KL", 8).blocks
    assert headline_plan("llama3.1-8b", "forward KL", 8).messages == 2 * blocks + 1
    assert headline_plan("llama3.1-8b", "UniSD*, K = 3", 8).messages == 2 + 2 * blocks + 1
    jsd = headline_plan("llama3.1-8b", "JSD", 8)
    assert jsd.messages == 3 * jsd.blocks + 1


def test_blocks_cover_the_rows():
    """Whole chunks of whole and cut blocks, and what is left."""
    for head in HEADS:
        for operation in OPERATIONS:
            for num_rows in (1, 500, 8192, 8193):
                plan = headline_plan(head, operation, 2)
                plan = replace(plan, case=replace(plan.case, num_rows=num_rows))
                split, blocks = plan.share.rows(plan.design), 0
                for start in range(0, num_rows, split.chunk):
                    blocks += len(range(start, min(start + split.chunk, num_rows), split.block))
                assert plan.blocks == blocks


def test_products_and_memory_of_a_rank():
    """A share of the columns, the last one padded; W, the workspace, and float32 gradients."""
    plan = headline_plan("llama3.1-8b", "forward KL", 8)
    assert plan.flops == 2 * 3 * N * H * V // 8
    assert plan.head_bytes == 2 * H * V // 8
    assert plan.extra_bytes == plan.share.rows("fused").held_bytes + 4 * N * H
    trainable = headline_plan("llama3.1-8b", "forward KL, trainable head", 8)
    assert trainable.extra_bytes == trainable.share.rows("fused").held_bytes + 4 * (N * H + V * H // 8)
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


def test_the_package_has_no_vocabulary_parallel_mode():
    """What the page says of it."""
    sources = [file.read_text() for file in (ROOT / "unisd_kernels").rglob("*.py")]
    assert not any("torch.distributed" in text or "all_reduce" in text for text in sources)
    assert any("weight.full_tensor()" in text for text in sources)
    assert "**the package has no vocabulary-parallel mode today**" in prose()


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
    last = {plan.messages for plan in plans if plan.ranks == 64 and plan.case.operation == "divergence"}
    assert last == {3, 4}
