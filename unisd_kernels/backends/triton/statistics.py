"""Statistics of a student's and a teacher's logits, block by block of columns, and of whole rows.

A block of columns gives, per row, numbers that merge without losing the digits of a small divergence. With
`delta = z_t - z_s` and, inside the block, the shift `mu = sum e_s delta / sum e_s` and `x = delta - mu`:

    m_s = max z_s,  s = sum e_s,  e_s = exp(z_s - m_s)        and m_t, t, e_t of the teacher
    b = sum e_s (e^x - 1 - x),   a = sum e_s (x e^x - (e^x - 1)),   moment = sum e_t ((z_t - m_t) - (z_s - m_s))
    h_s = sum e_s (z_s - m_s),   h_t = sum e_t (z_t - m_t)                           (entropies)

a and b are sums of terms of second order in x that are not negative. Of the row, with r the mean of delta under p_s,
`y = mu - r` of each block, and sums over the blocks weighted by e^(m_s - max m_s) and divided by that of s:

    Q = E_s[e^(delta - r) - 1 - (delta - r)]                 = sum e^y b + s (e^y - 1 - y)
    P = E_s[(delta - r) e^(delta - r) - (e^(delta - r) - 1)] = sum e^y (a + y b) + s (y e^y - (e^y - 1))
    c - r = log1p(Q),   c = logsumexp(z_t) - logsumexp(z_s)
    KL(p_t || p_s) = E_t[delta - r] - (c - r) = P / (1 + Q) - (log1p(Q) - Q / (1 + Q)),    KL(p_s || p_t) = c - r

Where the teacher has its mass on tokens whose e_s is nothing in float32, P and Q miss it; the row then takes c - r from
the log-sum-exps and KL(p_t || p_s) from the teacher's own moment: `E_t[delta] - c`, both less max z_t - max z_s. Under
p_t, z_t - max z_t and z_s - max z_s are about the divergence and the teacher's entropy, though the logits, delta and r
may be in the thousands. So does a row of large Q, where the two halves of the last line would cancel. Source:
docs/design.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unisd_kernels.backends.triton.math import (
    COUNTS,
    apply_softcap,
    exp,
    expm1,
    expm1_remainder,
    log1p,
    log1p_remainder,
    nan_unless_finite,
    tile_block,
)

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
# The logit of a column that is not there. Finite, so that 0 times it is 0.
MASKED = tl.constexpr(-1e30)

# Rows of the statistics [STATISTICS, rows].
DIVERGENCE = tl.constexpr(0)
STUDENT_LOGPROB = tl.constexpr(1)  # first the target's logit, then its log-probability
TEACHER_LOGPROB = tl.constexpr(2)  # first the target's logit, of a marked row the difference of the logits
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
    partials,
    z,
    delta,
    teacher,
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
    """Is the teacher far from the student in a block: does delta exceed its mean by more than one nat where p_t is?

    The same bits in every kernel that asks: no product here is added to anything, so that none is fused.
    """
    return moment > teacher_total * (1.0 + (shift - (teacher_max - student_max)))


@triton.jit
def load_pair(
    student,
    teacher,
    student_offsets,
    teacher_offsets,
    mask,
    is_difference,
    student_tanh,
    teacher_tanh,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    """z_s, z_t - z_s and z_t of some columns, from two float32 tiles. `is_difference`: the second holds z_t - z_s."""
    z = apply_softcap(tl.load(student + student_offsets, mask=mask, other=0.0), student_tanh, STUDENT_SOFTCAP)
    other = apply_softcap(tl.load(teacher + teacher_offsets, mask=mask, other=0.0), teacher_tanh, TEACHER_SOFTCAP)
    return z, tl.where(is_difference, other, other - z), tl.where(is_difference, z + other, other)


@triton.jit(do_not_specialize=COUNTS)
def block_statistics_kernel(
    student,
    teacher,
    is_difference,  # [rows] int8
    partials,
    num_rows,
    num_columns,
    student_stride,
    teacher_stride,
    num_blocks,
    student_tanh,
    teacher_tanh,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Partial statistics of float32 tiles that library products made. One read of each."""
    block, row_block = tile_block(num_columns, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    column_mask = columns < num_columns
    mask = row_mask[:, None] & column_mask[None, :]
    given = tl.load(is_difference + rows, mask=row_mask, other=0) != 0
    wide = rows.to(tl.int64)[:, None]
    z, delta, teacher_z = load_pair(
        student,
        teacher,
        wide * student_stride + columns[None, :],
        wide * teacher_stride + columns[None, :],
        mask,
        given[:, None],
        student_tanh,
        teacher_tanh,
        STUDENT_SOFTCAP,
        TEACHER_SOFTCAP,
    )
    z = tl.where(column_mask[None, :], z, MASKED)
    teacher_z = tl.where(column_mask[None, :], teacher_z, MASKED)
    store_partials(partials, z, delta, teacher_z, row_mask, rows, num_rows, block, num_blocks, WANT_ENTROPY)


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    partials,
    is_difference,
    statistics,
    num_rows,
    num_blocks,
    MARKED: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Statistics of one row from those of its blocks, `BLOCKS` of them at a time. One program a row."""
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
    # log1p(q) - q / (1 + q) without its first order. The two terms' rounding is u q (1 + q / 2) at most for small q and
    # u q for large q, where the result is only log(q) - 1: with q = e^40 nothing of it is left. That of E_t[delta] - c
    # is u (D + 2 H(p_t)) and that of two logarithms, whatever q. They meet between 1 and 2; at q = 2 the first is 3.1 u
    # and 7 u of the curvature's .43. There P and log1p(q) have no digits to save any more.
    curvature = q * q / (1.0 + q) - log1p_remainder(q)
    precise = tl.sum(second, 0) / total / (1.0 + q) - curvature
    # E_t[delta] - c, both less max z_t - max z_s.
    forward = tl.sum(moments, 0) / teacher_total - (tl.log(teacher_total) - tl.log(total))
    # A token out of reach adds p_t times 80 or more to E_t[delta - r], and shows here where it does not in log1p(q):
    # less than the noise there, it may still be all of c - r.
    agrees = tl.abs(precise - forward) <= noise + 1e-6 * tl.abs(forward)
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
        if MARKED:
            target_delta = tl.where(tl.load(is_difference + row) != 0, other, target_delta)
        tl.store(statistics + STUDENT_LOGPROB * num_rows + row, target)
        tl.store(statistics + TEACHER_LOGPROB * num_rows + row, target + (target_delta - difference))
    if WANT_ENTROPY:
        entropy = tl.log(total) - tl.sum(spreads, 0) / total
        teacher_entropy = tl.log(teacher_total) - tl.sum(teacher_spreads, 0) / teacher_total
        tl.store(statistics + STUDENT_ENTROPY * num_rows + row, entropy)
        tl.store(statistics + TEACHER_ENTROPY * num_rows + row, teacher_entropy)


@triton.jit(do_not_specialize=COUNTS)
def mixture_kernel(
    student,
    teacher,
    is_difference,
    statistics,
    num_rows,
    num_columns,
    student_stride,
    teacher_stride,
    student_tanh,
    teacher_tanh,
    beta,
    complement,  # 1 - beta, rounded once
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The generalized Jensen-Shannon divergence of one row, whose log-sum-exps are known. One program a row.

    With `d = log p_t - log p_s`, the larger probability g, `q = -|d|`, `E = e^q - 1` and `w` the weight of the smaller
    probability in m: `log(m / g) = log1p(w E)`. To both KLs are added terms that sum to zero over the vocabulary,
    m - p_s and m - p_t, so that every term is of second order in d and not negative:

        g log(g / m) - g + m = g X,   X = w E - log1p(w E)
        e log(e / m) - e + m = g Y,   Y = (1 - w) E^2 + e^q (X - (E - q))       for the smaller one, e = g e^q
                                        = e^q (t - log1p(t)),   t = m / e - 1 = (1 - w) (e^-q - 1)

    Near w = 1 the first form of Y cancels unless t is large, and 1 + w E is (1 - w) + w e^q.
    """
    row = tl.program_id(0)
    given = tl.load(is_difference + row) != 0
    logsumexp = tl.load(statistics + STUDENT_LOGSUMEXP * num_rows + row)
    difference = tl.load(statistics + LOGSUMEXP_DIFFERENCE * num_rows + row)
    teacher_logsumexp = tl.load(statistics + TEACHER_LOGSUMEXP * num_rows + row)
    student_terms = tl.zeros([BLOCK_COLUMNS], tl.float32)
    teacher_terms = tl.zeros([BLOCK_COLUMNS], tl.float32)
    wide = row.to(tl.int64)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < num_columns
        z, delta, teacher_z = load_pair(
            student,
            teacher,
            wide * student_stride + columns,
            wide * teacher_stride + columns,
            mask,
            given,
            student_tanh,
            teacher_tanh,
            STUDENT_SOFTCAP,
            TEACHER_SOFTCAP,
        )
        d = delta - difference
        student_logprob = tl.where(mask, z - logsumexp, -float("inf"))
        teacher_logprob = tl.where(mask, teacher_z - teacher_logsumexp, -float("inf"))
        larger = exp(tl.maximum(student_logprob, teacher_logprob))
        teacher_larger = d > 0.0
        weight = tl.where(teacher_larger, complement, beta)
        other_weight = tl.where(teacher_larger, beta, complement)
        q = tl.maximum(-tl.abs(d), -1e4)  # a finite number stands for infinity, and 0 times it is 0
        remainder = expm1_remainder(q)  # E - q
        e = expm1(q)
        ratio = exp(q)
        growth = weight * e
        of_larger = tl.where(
            growth < -0.4,
            growth - tl.log(tl.maximum(other_weight + weight * ratio, 1e-37)),
            log1p_remainder(tl.maximum(growth, -0.4)),
        )
        t = tl.minimum(other_weight * -e, ratio)  # times e^q; beyond 1 the other form
        near = ratio * log1p_remainder(t / tl.maximum(ratio, 1e-37))
        of_smaller = other_weight * e * e + ratio * (of_larger - remainder)
        of_smaller = tl.where(t < ratio, near, of_smaller)
        student_terms += larger * tl.where(teacher_larger, of_smaller, of_larger)
        teacher_terms += larger * tl.where(teacher_larger, of_larger, of_smaller)
    # The bounds above make numbers of a NaN.
    spoilt = nan_unless_finite(logsumexp) + nan_unless_finite(difference)
    student_kl = tl.sum(student_terms, 0) + spoilt
    teacher_kl = tl.sum(teacher_terms, 0)
    divergence = beta * teacher_kl + complement * student_kl
    tl.store(statistics + DIVERGENCE * num_rows + row, tl.where(divergence < 0.0, 0.0, divergence))
    tl.store(statistics + STUDENT_KL * num_rows + row, student_kl)
