"""Statistics of a student's and a teacher's logits, block by block of columns, and of whole rows.

A block of columns gives, per row, numbers that merge without losing the digits of a small divergence. With
`delta = z_t - z_s` and, inside the block, the shift `mu = sum e_s delta / sum e_s` and `x = delta - mu`:

    m_s = max z_s,  s = sum e_s,  e_s = exp(z_s - m_s)        and m_t, t, e_t of the teacher
    b = sum e_s (e^x - 1 - x),   a = sum e_s (x e^x - (e^x - 1)),   moment = sum e_t ((z_t - m_t) - (z_s - m_s))
    h_s = sum e_s (z_s - m_s),   h_t = sum e_t (z_t - m_t)                           (entropies)

delta and not z_t: where both views have one head it is a product of its own, `(h_t - h_s) W^T`, with all its digits. a
and b are sums of terms of second order in x that are not negative. Of the row, with r the mean of delta under p_s,
`y = mu - r` of each block, and sums over the blocks weighted by e^(m_s - max m_s) and divided by that of s:

    Q = E_s[e^(delta - r) - 1 - (delta - r)]                 = sum e^y b + s (e^y - 1 - y)
    P = E_s[(delta - r) e^(delta - r) - (e^(delta - r) - 1)] = sum e^y (a + y b) + s (y e^y - (e^y - 1))
    c - r = log1p(Q),   c = logsumexp(z_t) - logsumexp(z_s)
    KL(p_t || p_s) = E_t[delta - r] - (c - r) = P / (1 + Q) - (log1p(Q) - Q / (1 + Q)),    KL(p_s || p_t) = c - r

The last line has `E_t[delta - r] = (P + Q) / (1 + Q)`, since E_s[delta - r] = 0. Summed as it stands, E_t[delta - r]
has terms of first order in delta and of both signs; P and Q, each about half the variance of a small delta, have not,
and what is taken off P is only about Q^2 / 2. So no digits cancel, and the two log-sum-exps, each off by 2^-24 of some
tens, never meet: a D of 1e-6 keeps its digits to 2e-5 (tests/triton/test_divergence.py), where log-sum-exps of 10 leave
it none.

Where the teacher has its mass on tokens whose e_s is nothing in float32, P and Q miss it; the row then takes c - r from
the log-sum-exps and KL(p_t || p_s) from the teacher's own moment: `E_t[delta] - c`, both less max z_t - max z_s. Under
p_t, z_t - max z_t and z_s - max z_s are about the divergence and the teacher's entropy, though the logits, delta and r
may be in the thousands. So does a row of large Q, where the two halves of the last line would cancel. Source:
docs/design.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.base import DivergenceRows, ShardRows, WholeRows
from unisd_kernels.backends.buffers import most_rows, split_rows
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.launch import ceil_div, next_power_of_2
from unisd_kernels.backends.triton.math import (
    COUNTS,
    apply_softcap,
    exp,
    expm1,
    expm1_remainder,
    log1p,
    log1p_remainder,
)
from unisd_kernels.backends.triton.rows import target_logits
from unisd_kernels.backends.triton.variants import launch_variant

# The partial statistics are records [rows, blocks, RECORD] of 32 bytes, one sector of the memory, so that to write or
# read one number of a record costs no more than all of them; behind them, if wanted, [rows, blocks, SPREADS] for the
# entropies.
STUDENT_MAX = tl.constexpr(0)
STUDENT_SUM = tl.constexpr(1)
TEACHER_MAX = tl.constexpr(2)
TEACHER_SUM = tl.constexpr(3)
SHIFT = tl.constexpr(4)
EXCESS = tl.constexpr(5)  # b
SECOND_ORDER = tl.constexpr(6)  # a
MOMENT = tl.constexpr(7)
RECORD = tl.constexpr(8)
STUDENT_SPREAD = tl.constexpr(0)
TEACHER_SPREAD = tl.constexpr(1)
SPREADS = tl.constexpr(2)
NUM_PARTIALS = RECORD.value + SPREADS.value
# The kernels index partial statistics with 32 bits: this many rows times NUM_PARTIALS times 8192 blocks of columns.
_MOST_BLOCK_ROWS = 16384
# The logit of a column that is not there. Finite, so that 0 times it is 0.
MASKED = tl.constexpr(-1e30)

# Rows of the statistics [STATISTICS, rows].
DIVERGENCE = tl.constexpr(0)
STUDENT_LOGPROB = tl.constexpr(1)  # first the target's logit, then its log-probability
TEACHER_LOGPROB = tl.constexpr(2)  # first the target's logit, or the difference of the logits
STUDENT_ENTROPY = tl.constexpr(3)
TEACHER_ENTROPY = tl.constexpr(4)
STUDENT_LOGSUMEXP = tl.constexpr(5)
LOGSUMEXP_DIFFERENCE = tl.constexpr(6)  # c
STUDENT_KL = tl.constexpr(7)  # KL(p_s || m) of a mixture
MEAN_DIFFERENCE = tl.constexpr(7)  # of a reverse KL: r, the mean of delta under p_s
# For p_t itself: log p_s + (delta - c) is off by the rounding of numbers as large as the student's logits.
TEACHER_LOGSUMEXP = tl.constexpr(8)
NUM_STATISTICS = 9


@triton.jit
def store_partials(
    partials,  # Partials.values
    z,  # [rows, columns]
    delta,  # [rows, columns]
    teacher,  # [rows, columns]
    row_mask,
    rows,
    num_rows,
    block,
    num_blocks,
    WANT_ENTROPY: tl.constexpr,
):
    """Write the statistics of one block of columns, [rows, columns]; returns m_s, mu, m_t and
    `is_far`.

    Where a column is masked, `z` and `teacher`, z_t, are `MASKED` and `delta` any number: the exponentials are 0, and 0
    times them still 0.
    """
    place = rows * num_blocks + block
    out = partials + place * RECORD
    spreads = partials + num_rows * num_blocks * RECORD + place * SPREADS
    # Three passes over the tile's registers: the maximum, the mean of delta, the sums about that mean. About zero, or
    # about another block's mean, they would be of first order in delta, and cancel later.
    highest = tl.max(z, 1)
    exponentials = exp(z - highest[:, None])
    total = tl.sum(exponentials, 1)
    shift = tl.sum(exponentials * delta, 1) / total
    x = delta - shift[:, None]
    # e^80 is still a number, also as a factor of the next steps.
    bounded = tl.minimum(x, 80.0)
    remainder = expm1_remainder(bounded)
    excess = tl.sum(exponentials * remainder, 1)
    second_order = tl.sum(exponentials * (bounded * expm1(bounded) - remainder), 1)
    tl.store(out + STUDENT_MAX, highest, mask=row_mask)
    tl.store(out + STUDENT_SUM, total, mask=row_mask)
    tl.store(out + SHIFT, shift, mask=row_mask)
    tl.store(out + EXCESS, excess, mask=row_mask)
    tl.store(out + SECOND_ORDER, second_order, mask=row_mask)
    if WANT_ENTROPY:
        spread = tl.sum(exponentials * (z - highest[:, None]), 1)
        tl.store(spreads + STUDENT_SPREAD, spread, mask=row_mask)
    teacher_highest = tl.max(teacher, 1)
    exponentials = exp(teacher - teacher_highest[:, None])
    tl.store(out + TEACHER_MAX, teacher_highest, mask=row_mask)
    teacher_total = tl.sum(exponentials, 1)
    moment = tl.sum(exponentials * ((teacher - teacher_highest[:, None]) - (z - highest[:, None])), 1)
    tl.store(out + TEACHER_SUM, teacher_total, mask=row_mask)
    tl.store(out + MOMENT, moment, mask=row_mask)
    if WANT_ENTROPY:
        spread = tl.sum(exponentials * (teacher - teacher_highest[:, None]), 1)
        tl.store(spreads + TEACHER_SPREAD, spread, mask=row_mask)
    return highest, shift, teacher_highest, is_far(highest, shift, teacher_highest, teacher_total, moment)


@triton.jit
def is_far(student_max, shift, teacher_max, teacher_total, moment):
    """Whether the teacher is far from the student in a block: delta is more than a nat above its mean where p_t is.

    The same bits in every kernel that asks: no product here is added to anything, so that none is fused.
    """
    return moment > teacher_total * (1.0 + (shift - (teacher_max - student_max)))


@triton.jit
def load_logits(
    student,  # launch.LogitTile, [rows, V] float32
    teacher,  # launch.LogitTile, [rows, V] float32
    rows,  # int64, which broadcast with `columns`
    columns,
    mask,
    is_delta,  # which of the rows of `teacher` hold z_t - z_s; None: none does
):
    """z_s, delta = z_t - z_s and z_t of some rows and columns."""
    z = tl.load(student.logits + (rows * student.stride + columns), mask=mask, other=0.0)
    z = apply_softcap(z, student.tanh_scale)
    other = tl.load(teacher.logits + (rows * teacher.stride + columns), mask=mask, other=0.0)
    other = apply_softcap(other, teacher.tanh_scale)
    delta = other - z
    if is_delta is not None:
        delta = tl.where(is_delta, other, delta)
        other = tl.where(is_delta, z + other, other)
    return z, delta, other


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    partials,  # Partials.values
    row_is_delta,  # [rows] int8, or None: none is
    statistics,  # [NUM_STATISTICS, rows]
    num_rows,
    num_blocks,
    HAS_TARGETS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Statistics of one row from those of its blocks, `BLOCKS` of them at a time. One program a row.

    Three passes over the records, for the maxima, the means and the sums about the mean: 1002 blocks of 128 columns are
    32 KB, which the second and third pass find in the cache.
    """
    row = tl.program_id(0)
    source = partials + row * num_blocks * RECORD
    spread_source = partials + (num_rows * RECORD + row * SPREADS) * num_blocks
    lanes = tl.arange(0, BLOCKS)
    student_max = tl.full([BLOCKS], -float("inf"), tl.float32)
    teacher_max = tl.full([BLOCKS], -float("inf"), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        at = source + (start + lanes) * RECORD
        mask = start + lanes < num_blocks
        student_max = tl.maximum(student_max, tl.load(at + STUDENT_MAX, mask=mask, other=-float("inf")))
        teacher_max = tl.maximum(teacher_max, tl.load(at + TEACHER_MAX, mask=mask, other=-float("inf")))
    highest = tl.max(student_max, 0)
    teacher_highest = tl.max(teacher_max, 0)

    sums = tl.zeros([BLOCKS], tl.float32)
    teacher_sums = tl.zeros([BLOCKS], tl.float32)
    shifts = tl.zeros([BLOCKS], tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        at = source + (start + lanes) * RECORD
        mask = start + lanes < num_blocks
        scale = exp(tl.load(at + STUDENT_MAX, mask=mask, other=-float("inf")) - highest)
        teacher_scale = exp(tl.load(at + TEACHER_MAX, mask=mask, other=-float("inf")) - teacher_highest)
        share = scale * tl.load(at + STUDENT_SUM, mask=mask, other=0.0)
        sums += share
        shifts += share * tl.load(at + SHIFT, mask=mask, other=0.0)
        teacher_sums += teacher_scale * tl.load(at + TEACHER_SUM, mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    teacher_total = tl.sum(teacher_sums, 0)
    logsumexp = highest + tl.log(total)
    teacher_logsumexp = teacher_highest + tl.log(teacher_total)
    mean_shift = tl.sum(shifts, 0) / total

    first = tl.zeros([BLOCKS], tl.float32)  # Q
    second = tl.zeros([BLOCKS], tl.float32)  # P
    moments = tl.zeros([BLOCKS], tl.float32)
    spreads = tl.zeros([BLOCKS], tl.float32)
    teacher_spreads = tl.zeros([BLOCKS], tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        at = source + (start + lanes) * RECORD
        mask = start + lanes < num_blocks
        above = tl.load(at + STUDENT_MAX, mask=mask, other=highest) - highest
        teacher_above = tl.load(at + TEACHER_MAX, mask=mask, other=teacher_highest) - teacher_highest
        student_sum = tl.load(at + STUDENT_SUM, mask=mask, other=0.0)
        teacher_sum = tl.load(at + TEACHER_SUM, mask=mask, other=0.0)
        excess = tl.load(at + EXCESS, mask=mask, other=0.0)
        moment = tl.load(at + MOMENT, mask=mask, other=0.0)
        y = tl.load(at + SHIFT, mask=mask, other=mean_shift) - mean_shift
        bounded = tl.minimum(y, 40.0)
        remainder = expm1_remainder(bounded)
        grown = exp(bounded)
        scale = exp(above)
        first += scale * (grown * excess + student_sum * remainder)
        second_order = tl.load(at + SECOND_ORDER, mask=mask, other=0.0)
        of_shift = bounded * expm1(bounded) - remainder
        second += scale * (grown * (second_order + bounded * excess) + student_sum * of_shift)
        moments += exp(teacher_above) * (moment + teacher_sum * (teacher_above - above))
        if WANT_ENTROPY:
            spread_at = spread_source + (start + lanes) * SPREADS
            spread = tl.load(spread_at + STUDENT_SPREAD, mask=mask, other=0.0)
            spreads += scale * (spread + student_sum * above)
            spread = tl.load(spread_at + TEACHER_SPREAD, mask=mask, other=0.0)
            teacher_spreads += exp(teacher_above) * (spread + teacher_sum * teacher_above)

    q = tl.sum(first, 0) / total
    direct = teacher_logsumexp - logsumexp - mean_shift
    # The two agree but for the rounding of the log-sum-exps, unless something was out of float32's reach.
    noise = 1e-6 * (1.0 + tl.abs(logsumexp) + tl.abs(teacher_logsumexp) + tl.abs(mean_shift))
    in_reach = tl.abs(log1p(q) - direct) <= noise
    # log1p(q) - q / (1 + q) without its first order: with R = q - log1p(q) it is q^2 / (1 + q) - R.
    # The two terms' rounding is u q (1 + q / 2) at most for small q and u q for large q, where the result is only
    # log(q) - 1: with q = e^40 nothing of it is left. That of E_t[delta] - c is u (D + 2 H(p_t)) and that of two
    # logarithms, whatever q. They meet between 1 and 2; at q = 2 the first is 3.1 u and 7 u of the curvature's .43.
    # There P and log1p(q) have no digits to save any more.
    curvature = q * q / (1.0 + q) - log1p_remainder(q)
    precise = tl.sum(second, 0) / total / (1.0 + q) - curvature
    # E_t[delta] - c, both less max z_t - max z_s.
    forward = tl.sum(moments, 0) / teacher_total - (tl.log(teacher_total) - tl.log(total))
    # A token out of reach adds p_t times 80 or more to E_t[delta - r], and shows here where it does not in log1p(q):
    # less than the noise there, it may still be all of c - r. What `forward` sums is as large as D and H(p_t), however
    # large the logits, and so is its rounding; but of a row of differences z_t itself was rounded.
    forward_noise = 3e-5
    if row_is_delta is not None:
        forward_noise = tl.where(tl.load(row_is_delta + row) != 0, noise, 3e-5)
    agrees = tl.abs(precise - forward) <= forward_noise + 1e-6 * tl.abs(forward)
    in_reach = in_reach & (agrees | (q >= 2.0))
    beyond = tl.where(in_reach, log1p(q), direct)  # c - r
    divergence = beyond
    if not REVERSE:
        divergence = tl.where(in_reach & (q < 2.0), precise, forward)
    # Below zero there is only rounding. A NaN stays.
    divergence = tl.where(divergence < 0.0, 0.0, divergence)
    difference = beyond + mean_shift
    tl.store(statistics + DIVERGENCE * num_rows + row, divergence)
    tl.store(statistics + STUDENT_LOGSUMEXP * num_rows + row, logsumexp)
    tl.store(statistics + LOGSUMEXP_DIFFERENCE * num_rows + row, difference)
    tl.store(statistics + TEACHER_LOGSUMEXP * num_rows + row, teacher_logsumexp)
    if REVERSE:
        tl.store(statistics + MEAN_DIFFERENCE * num_rows + row, mean_shift)
    if HAS_TARGETS:
        z = tl.load(statistics + STUDENT_LOGPROB * num_rows + row)
        target = z - logsumexp
        other = tl.load(statistics + TEACHER_LOGPROB * num_rows + row)
        target_delta = other - z
        if row_is_delta is not None:
            target_delta = tl.where(tl.load(row_is_delta + row) != 0, other, target_delta)
        tl.store(statistics + STUDENT_LOGPROB * num_rows + row, target)
        tl.store(statistics + TEACHER_LOGPROB * num_rows + row, target + (target_delta - difference))
    if WANT_ENTROPY:
        entropy = tl.log(total) - tl.sum(spreads, 0) / total
        teacher_entropy = tl.log(teacher_total) - tl.sum(teacher_spreads, 0) / teacher_total
        tl.store(statistics + STUDENT_ENTROPY * num_rows + row, entropy)
        tl.store(statistics + TEACHER_ENTROPY * num_rows + row, teacher_entropy)


class Partials(NamedTuple):
    """Statistics of blocks of columns, float32."""

    values: torch.Tensor  # [rows * num_blocks * NUM_PARTIALS], records and then the sums for entropies, if wanted
    num_blocks: int
    block_columns: int

    @classmethod
    def empty(
        cls, rows: int, num_columns: int, block_columns: int, want_entropy: bool, device: torch.device
    ) -> Partials:
        num_blocks = ceil_div(num_columns, block_columns)
        numbers = NUM_PARTIALS if want_entropy else RECORD.value
        values = torch.empty(rows * num_blocks * numbers, dtype=torch.float32, device=device)
        return cls(values, num_blocks, block_columns)


def partials_bytes(num_columns: int, block_columns: int) -> int:
    """Bytes of the partial statistics of a row, with those for an entropy."""
    return torch.float32.itemsize * NUM_PARTIALS * ceil_div(num_columns, block_columns)


def chunk_and_block_rows(
    student: Projection, workspace_bytes: int, chunk_row_bytes: int, block_row_bytes: int
) -> tuple[int, int]:
    """`buffers.split_rows` of a divergence, whose blocks the kernels can index.

    Raises:
        ValueError: the workspace does not hold one row.
    """
    most_rows(workspace_bytes, chunk_row_bytes + block_row_bytes, student.sizing_columns)
    chunk, block = split_rows(student.hidden.shape[0], workspace_bytes, chunk_row_bytes, block_row_bytes)
    return chunk, min(block, _MOST_BLOCK_ROWS)


def combine(
    partials: Partials,
    student: Projection,
    teacher: Projection,
    row_is_delta: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    want_entropy: bool,
    beta: float,
) -> torch.Tensor:
    """[NUM_STATISTICS, rows] of all of the student's rows; teacher and `row_is_delta` as from `rows.teacher_rows`.

    Of a mixture the divergence is not in it: that takes the log-sum-exps, which are.
    """
    rows, device = student.hidden.shape[0], student.hidden.device
    statistics = torch.empty(NUM_STATISTICS, rows, dtype=torch.float32, device=device)
    if target_ids is not None:
        # Of a slice of a vocabulary -1 where another rank has the target; then any column will do.
        ids = target_ids.contiguous() if student.shard is None else target_ids.clamp(min=0)
        target_logits(student, None, ids, statistics[STUDENT_LOGPROB.value])
        target_logits(teacher, row_is_delta, ids, statistics[TEACHER_LOGPROB.value])
    launch_variant(
        combine_kernel,
        (rows,),
        partials.values,
        row_is_delta,
        statistics,
        rows,
        partials.num_blocks,
        HAS_TARGETS=target_ids is not None,
        WANT_ENTROPY=want_entropy,
        REVERSE=beta == 1.0,
        BLOCKS=min(1024, next_power_of_2(partials.num_blocks)),
    )
    return statistics


def divergence_rows(statistics: torch.Tensor, has_targets: bool, want_entropy: bool) -> DivergenceRows:
    """Those of [NUM_STATISTICS, rows] that the engine takes."""
    return DivergenceRows(
        statistics[DIVERGENCE.value],
        statistics[STUDENT_LOGPROB.value] if has_targets else None,
        statistics[TEACHER_LOGPROB.value] if has_targets else None,
        statistics[STUDENT_ENTROPY.value] if want_entropy else None,
        statistics[TEACHER_ENTROPY.value] if want_entropy else None,
    )


def shard_rows(statistics: torch.Tensor, mixture: bool, has_targets: bool, want_entropy: bool) -> ShardRows:
    """Those that the ranks of a vocabulary exchange, if the columns are a slice of it."""
    rows = divergence_rows(statistics, has_targets, want_entropy)
    student = statistics[STUDENT_LOGSUMEXP.value].double()
    # The difference of the log-sum-exps has more digits than either.
    teacher = student + statistics[LOGSUMEXP_DIFFERENCE.value]
    return ShardRows(student, teacher, None if mixture else rows.divergence, *rows[1:])


def take_whole(statistics: torch.Tensor, whole: WholeRows, beta: float) -> None:
    """Put what the gradient reads of the whole vocabulary in the place of what is of a slice of it."""
    difference = whole.teacher_logsumexp - whole.student_logsumexp
    statistics[STUDENT_LOGSUMEXP.value] = whole.student_logsumexp
    statistics[TEACHER_LOGSUMEXP.value] = whole.teacher_logsumexp
    statistics[LOGSUMEXP_DIFFERENCE.value] = difference
    statistics[DIVERGENCE.value] = whole.rows.divergence
    if beta == 1.0:
        statistics[MEAN_DIFFERENCE.value] = difference - whole.rows.divergence  # D = c - r
    if whole.student_kl is not None:
        statistics[STUDENT_KL.value] = whole.student_kl
