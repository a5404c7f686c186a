"""The generalized Jensen-Shannon divergence of rows whose log-sum-exps are known: its sums, and their launches.

Two kinds of tiles: float32 logits that library products made, and what the fused kernel stores in 16 bits
(`fused_divergence.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.triton.launch import LogitTile, ceil_div
from unisd_kernels.backends.triton.math import COUNTS, exp, expm1, log_share, nan_unless_finite, short_log1p_remainder
from unisd_kernels.backends.triton.shifted import LARGEST, block_references, differences, student_base
from unisd_kernels.backends.triton.statistics import (
    DIVERGENCE,
    LOGSUMEXP_DIFFERENCE,
    STUDENT_KL,
    STUDENT_LOGSUMEXP,
    TEACHER_LOGSUMEXP,
    Partials,
    load_logits,
)
from unisd_kernels.backends.triton.variants import launch_variant

# Columns that one program sums, and how many at a time. A block of logits has a few hundred rows: a program for each
# whole row would leave most of a GPU idle.
MIXTURE_COLUMNS, MIXTURE_BLOCK = 8192, 1024
ROWS_OF_SUMS = 32


@triton.jit
def mixture_terms(student_logprob, teacher_logprob, d, beta, complement):
    """A token's terms of KL(p_s || m) and of KL(p_t || m), `m = (1 - beta) p_s + beta p_t`, of second order in d.

    To both KLs are added terms that sum to zero over the vocabulary, m - p_s and m - p_t, so that no term is negative.
    With `m / p_s = 1 + g`, `g = beta (e^d - 1)`, `m / p_t = 1 + f`, `f = (1 - beta) (e^-d - 1)` and
    `R(x) = x - log(1 + x)`:

        p_s log(p_s / m) - p_s + m = p_s R(g) = beta (p_t - p_s) - p_s log(m / p_s)
        p_t log(p_t / m) - p_t + m = p_t R(f) = (1 - beta) (p_s - p_t) - p_t log(m / p_t)

    on the right what holds at any distance, with one logarithm, that of m over the larger of the two; it cancels where
    g or f is small, and there is the series of R.

    Against the plain `sum p log(p / m)`: its terms are of first order in d and of both signs, so that a divergence of
    1e-6 is the rest of terms of 1e-3, and float32 leaves it four digits at best.
    """
    p_s = exp(student_logprob)
    p_t = exp(teacher_logprob)
    log_of_share = log_share(d, beta, complement)
    apart = p_t - p_s
    student_term = beta * apart - p_s * (tl.maximum(d, 0.0) + log_of_share)
    teacher_term = -complement * apart - p_t * (tl.maximum(-d, 0.0) + log_of_share)
    # e^80 is still a number; that far apart no series is taken but of a weight that is nothing.
    bounded = tl.minimum(tl.maximum(d, -80.0), 80.0)
    e = expm1(bounded)
    g = beta * e
    f = -complement * e * exp(-bounded)
    # Beyond 0.125 the rounding of the other form is 1e-5 of R.
    student_term = tl.where(tl.abs(g) < 0.125, p_s * short_log1p_remainder(g), student_term)
    teacher_term = tl.where(tl.abs(f) < 0.125, p_t * short_log1p_remainder(f), teacher_term)
    return student_term, teacher_term


@triton.jit(do_not_specialize=COUNTS)
def mixture_kernel(
    student,  # launch.LogitTile, [num_rows, num_columns]
    teacher,  # launch.LogitTile, [num_rows, num_columns]
    row_is_delta,  # [rows] int8, or None: none is
    partials,  # statistics.Partials.values
    statistics,  # [NUM_STATISTICS, rows]
    sums,  # [2, num_splits, num_rows]: of the student's terms, of the teacher's
    num_rows,
    num_columns,
    num_blocks,
    num_splits,
    beta,
    complement,  # 1 - beta, rounded once
    SHIFTED: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums of `mixture_terms` of one row over a split of its columns, `BLOCKS` blocks of `BLOCK_COLUMNS` at a time. One
    program for each; `mixture_rows_kernel` adds them up.

    `SHIFTED`: the tiles hold what the fused kernel stores of such a block. What it rounds to 16 bits are z_s and delta,
    each less a reference, so that a term is off by a few 2^-11 of itself: the sum by less, and never by a share of
    something larger than itself.
    """
    split, row = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    logsumexp = tl.load(statistics + STUDENT_LOGSUMEXP * num_rows + row)
    difference = tl.load(statistics + LOGSUMEXP_DIFFERENCE * num_rows + row)
    teacher_logsumexp = tl.load(statistics + TEACHER_LOGSUMEXP * num_rows + row)
    is_delta = row_is_delta
    if not SHIFTED and row_is_delta is not None:
        is_delta = tl.load(row_is_delta + row) != 0
    student_terms = tl.zeros([BLOCKS, BLOCK_COLUMNS], tl.float32)
    teacher_terms = tl.zeros([BLOCKS, BLOCK_COLUMNS], tl.float32)
    wide = row.to(tl.int64)
    for start in range(0, SPLIT_BLOCKS, BLOCKS):
        blocks = split * SPLIT_BLOCKS + start + tl.arange(0, BLOCKS)
        columns = blocks[:, None] * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = columns < num_columns
        if SHIFTED:
            highest, shift, teacher_highest, far = block_references(
                partials, row * num_blocks + blocks, blocks < num_blocks
            )
            # A column that is not there has no probability.
            z = tl.load(student.logits + wide * student.stride + columns, mask=mask, other=-LARGEST).to(tl.float32)
            other = tl.load(teacher.logits + wide * teacher.stride + columns, mask=mask, other=-LARGEST).to(tl.float32)
            base = student_base(z, highest[:, None], student.tanh_scale)
            student_logprob = z + (base - logsumexp)
            d, teacher_logprob = differences(
                student_logprob,
                other,
                shift[:, None],
                teacher_highest[:, None],
                far[:, None],
                difference,
                teacher_logsumexp,
            )
        else:
            z, delta, teacher_z = load_logits(student, teacher, wide, columns, mask, is_delta)
            d = delta - difference
            student_logprob = tl.where(mask, z - logsumexp, -float("inf"))
            teacher_logprob = tl.where(mask, teacher_z - teacher_logsumexp, -float("inf"))
        student_term, teacher_term = mixture_terms(student_logprob, teacher_logprob, d, beta, complement)
        student_terms += student_term
        teacher_terms += teacher_term
    out = sums + split * num_rows + row
    tl.store(out, tl.sum(tl.sum(student_terms, 1), 0))
    tl.store(out + num_splits * num_rows, tl.sum(tl.sum(teacher_terms, 1), 0))


@triton.jit(do_not_specialize=COUNTS)
def mixture_rows_kernel(
    sums,  # [2, num_splits, num_rows]
    statistics,  # [NUM_STATISTICS, rows]
    num_rows,
    num_splits,
    beta,
    complement,  # 1 - beta, rounded once
    BLOCK_ROWS: tl.constexpr,
):
    """The divergence and its student's part of some rows, from the sums of `mixture_kernel`, always in one order."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = rows < num_rows
    student_kl = tl.zeros([BLOCK_ROWS], tl.float32)
    teacher_kl = tl.zeros([BLOCK_ROWS], tl.float32)
    for split in range(num_splits):
        at = sums + split * num_rows + rows
        student_kl += tl.load(at, mask=mask, other=0.0)
        teacher_kl += tl.load(at + num_splits * num_rows, mask=mask, other=0.0)
    # The bounds in the terms make numbers of a NaN.
    student_kl += nan_unless_finite(tl.load(statistics + STUDENT_LOGSUMEXP * num_rows + rows, mask=mask, other=0.0))
    student_kl += nan_unless_finite(tl.load(statistics + LOGSUMEXP_DIFFERENCE * num_rows + rows, mask=mask, other=0.0))
    divergence = beta * teacher_kl + complement * student_kl
    tl.store(statistics + DIVERGENCE * num_rows + rows, tl.where(divergence < 0.0, 0.0, divergence), mask=mask)
    tl.store(statistics + STUDENT_KL * num_rows + rows, student_kl, mask=mask)


def steps(block_columns: int | None) -> tuple[int, int, int]:
    """Columns of a block, blocks at a time, and blocks of a split, whole steps; `block_columns`: of shifted logits."""
    width = block_columns or MIXTURE_BLOCK
    blocks = max(1, MIXTURE_BLOCK // width)
    return width, blocks, max(1, MIXTURE_COLUMNS // (width * blocks)) * blocks


def mix(
    student: LogitTile,
    teacher: LogitTile,
    row_is_delta: torch.Tensor | None,
    partials: Partials,
    statistics: torch.Tensor,
    beta: float,
    num_columns: int,
    shifted: bool,
) -> None:
    """Write the divergence of a mixture, and its student's part, to the statistics; `shifted`: see `mixture_kernel`."""
    num_rows = statistics.shape[1]
    width, blocks, split_blocks = steps(partials.block_columns if shifted else None)
    splits = ceil_div(num_columns, split_blocks * width)
    sums = torch.empty(2, splits, num_rows, dtype=torch.float32, device=statistics.device)
    weights = beta, 1.0 - beta
    launch_variant(
        mixture_kernel,
        (num_rows * splits,),
        student,
        teacher,
        row_is_delta,
        partials.values,
        statistics,
        sums,
        num_rows,
        num_columns,
        partials.num_blocks,
        splits,
        *weights,
        SHIFTED=shifted,
        SPLIT_BLOCKS=split_blocks,
        BLOCKS=blocks,
        BLOCK_COLUMNS=width,
        num_warps=4,
    )
    launch_variant(
        mixture_rows_kernel,
        (ceil_div(num_rows, ROWS_OF_SUMS),),
        sums,
        statistics,
        num_rows,
        splits,
        *weights,
        BLOCK_ROWS=ROWS_OF_SUMS,
        num_warps=1,
    )
