"""Gradients with respect to the logits, once the statistics of the rows are known: kernels of one read and one write,
and their launches.

All are gradients with respect to `a x / tau`: the factor of a soft cap's tanh is in them, the constant `a / tau` is
left to the small results. Formulas: docs/design.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.base import ScoreGrads, Scores, SoftmaxRows
from unisd_kernels.backends.buffers import contiguous
from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.backends.triton.launch import (
    LONG_COLUMNS,
    TILE_COLUMNS,
    TILE_ROWS,
    LogitTile,
    next_power_of_2,
    on_device,
    tile_grid,
)
from unisd_kernels.backends.triton.math import (
    COUNTS,
    apply_softcap,
    exp,
    expm1,
    log_share,
    short_log1p,
    softcap_gradient,
    tile_block,
)
from unisd_kernels.backends.triton.shifted import block_references, differences, student_base
from unisd_kernels.backends.triton.statistics import (
    LOGSUMEXP_DIFFERENCE,
    MEAN_DIFFERENCE,
    RECORD,
    SHIFT,
    STUDENT_KL,
    STUDENT_LOGSUMEXP,
    STUDENT_MAX,
    TEACHER_LOGSUMEXP,
    Partials,
    load_logits,
)
from unisd_kernels.backends.triton.variants import launch_variant


@triton.jit(do_not_specialize=COUNTS)
def divergence_gradient_kernel(
    student,  # launch.LogitTile, [num_rows, num_columns]
    teacher,  # launch.LogitTile, [num_rows, num_columns]
    gradient,  # may be the student's tile: every element is read before it is written, by the same program
    row_is_delta,  # [rows] int8, or None: none is
    partials,  # statistics.Partials.values
    statistics,  # [NUM_STATISTICS, rows]
    target_ids,  # [rows]
    weight,  # [rows], or None for one
    logprob_weight,  # [rows], or None for zero
    num_rows,
    num_columns,
    gradient_stride,
    num_blocks,
    beta,
    complement,  # 1 - beta, rounded once
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The gradient of `sum_n weight_n D_n + logprob_weight_n logp_n(y_n)`.

    With `d = log p_t - log p_s = delta - c` and `m = (1 - beta) p_s + beta p_t`, by dz_s of one logit:

        KL(p_t || p_s)     p_s - p_t = -p_s (e^d - 1)
        KL(p_s || p_t)     p_s (-d - D) = p_s (r - delta),    since D = c - r
        JSD                (1 - beta) p_s (log(p_s / m) - KL(p_s || m))

    each a probability times a number that is small where student and teacher are near, never a difference of two
    numbers that are not. A token's log-probability adds `1[y] - p_s` times its weight.

    `SHIFTED`: the tiles hold z_s and z_t - z_s or z_t less the references of their block of `BLOCK_COLUMNS` columns
    (fused_divergence.py). Otherwise they hold `product_scale (h W^T + b)` in float32.
    """
    block, row_block = tile_block(num_columns, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    # Shifted tiles have padded rows, which are read and written to the end of a vector.
    end = student.stride if SHIFTED else num_columns
    mask = row_mask[:, None] & (columns < end)[None, :]
    wide = rows.to(tl.int64)[:, None]
    logsumexp = tl.load(statistics + STUDENT_LOGSUMEXP * num_rows + rows, mask=row_mask, other=0.0)
    difference = tl.load(statistics + LOGSUMEXP_DIFFERENCE * num_rows + rows, mask=row_mask, other=0.0)
    if not REVERSE:
        teacher_logsumexp = tl.load(statistics + TEACHER_LOGSUMEXP * num_rows + rows, mask=row_mask, other=0.0)
    if SHIFTED:
        place = rows * num_blocks + block
        z = tl.load(student.logits + wide * student.stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.load(teacher.logits + wide * teacher.stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if REVERSE:
            highest = tl.load(partials + place * RECORD + STUDENT_MAX, mask=row_mask, other=0.0)
            shift = tl.load(partials + place * RECORD + SHIFT, mask=row_mask, other=0.0)
        else:
            highest, shift, teacher_highest, far = block_references(partials, place, row_mask)
        base = student_base(z, highest[:, None], student.tanh_scale)
        if student.tanh_scale is not None:
            slope = ((student.tanh_scale - base) - z) * ((student.tanh_scale + base) + z)
            slope /= student.tanh_scale * student.tanh_scale
        logprob = z + (base - logsumexp[:, None])
        if REVERSE:
            delta, origin = d, shift
        else:
            d, teacher_logprob = differences(
                logprob,
                d,
                shift[:, None],
                teacher_highest[:, None],
                far[:, None],
                difference[:, None],
                teacher_logsumexp[:, None],
            )
    else:
        is_delta = row_is_delta
        if row_is_delta is not None:
            is_delta = (tl.load(row_is_delta + rows, mask=row_mask, other=0) != 0)[:, None]
        z, delta, teacher_z = load_logits(student, teacher, wide, columns[None, :], mask, is_delta)
        origin = tl.zeros_like(difference)
        if student.tanh_scale is not None:
            slope = softcap_gradient(z, student.tanh_scale)
        d = delta - difference[:, None]
        logprob = z - logsumexp[:, None]
        if FORWARD:
            teacher_logprob = teacher_z - teacher_logsumexp[:, None]
    p = exp(logprob)
    if FORWARD:
        # p_s - p_t. Near each other as p_s times a small number; far out e^d may overflow where p_s is zero. Beyond
        # |d| = 0.5 the difference of the two is at least 0.39 of the larger one: less than two bits cancel.
        result = tl.where(tl.abs(d) < 0.5, -p * expm1(d), p - exp(teacher_logprob))
    else:
        if REVERSE:
            # log p_s - log p_t - D = r - delta. Of what is stored, delta less the block's shift, the shift is brought
            # to the row's mean first: both may be far larger than their difference, which is what counts.
            mean = tl.load(statistics + MEAN_DIFFERENCE * num_rows + rows, mask=row_mask, other=0.0)
            result = -p * (delta + (origin - mean)[:, None])
        else:
            student_kl = tl.load(statistics + STUDENT_KL * num_rows + rows, mask=row_mask, other=0.0)
            # u = log(m / p_s) = log1p(beta expm1(d)); where that does not cancel, the logarithm of m over the larger of
            # the two. e^80 is still a number. Beyond a growth of 0.1 the rounding of that logarithm is 1e-6 of u.
            growth = beta * expm1(tl.minimum(d, 80.0))
            of_larger = tl.maximum(d, 0.0) + log_share(d, beta, complement)
            u = tl.where(tl.abs(growth) < 0.1, short_log1p(growth), of_larger)
            result = -complement * p * (u + student_kl[:, None])
    if weight is not None:
        result *= tl.load(weight + rows, mask=row_mask, other=0.0)[:, None]
    if logprob_weight is not None:
        of_logprob = tl.load(logprob_weight + rows, mask=row_mask, other=0.0)[:, None]
        targets = tl.load(target_ids + rows, mask=row_mask, other=-1).to(tl.int32)
        result += of_logprob * (tl.where(columns[None, :] == targets[:, None], 1.0, 0.0) - p)
    if student.tanh_scale is not None:
        result *= slope
    tl.store(gradient + wide * gradient_stride + columns[None, :], result.to(gradient.dtype.element_ty), mask=mask)


class Saved(NamedTuple):
    """Inputs of the gradient of a block of rows, once its statistics are taken; and its place."""

    student: LogitTile  # [rows, V]
    teacher: LogitTile  # [rows, V]
    row_is_delta: torch.Tensor | None  # [rows] int8: does the teacher's row hold z_t - z_s? None: none does
    partials: Partials
    statistics: torch.Tensor  # [NUM_STATISTICS, rows]
    gradient: torch.Tensor  # [rows, V], where it is to be written


def write_divergence_gradient(
    saved: Saved,
    beta: float,
    target_ids: torch.Tensor | None,
    weight: torch.Tensor | None,
    logprob_weight: torch.Tensor | None,
    shifted: bool,
) -> None:
    """Write the gradient of `sum_n weight_n D_n + logprob_weight_n logp_n(y_n)` with respect to the student's
    `a x / tau` into `saved.gradient`; ids and weights are [rows]. `shifted`: what the tiles hold, see the kernel."""
    columns = saved.partials.block_columns if shifted else TILE_COLUMNS
    rows = max(1, TILE_ROWS * TILE_COLUMNS // columns) if shifted else TILE_ROWS
    gradient = saved.gradient
    with on_device(gradient):
        launch_variant(
            divergence_gradient_kernel,
            tile_grid(gradient, rows, columns),
            saved.student,
            saved.teacher,
            gradient,
            saved.row_is_delta,
            saved.partials.values,
            saved.statistics,
            contiguous(target_ids),
            contiguous(weight),
            contiguous(logprob_weight),
            *gradient.shape,
            gradient.stride(0),
            saved.partials.num_blocks,
            beta,
            1.0 - beta,
            FORWARD=beta == 0.0,
            REVERSE=beta == 1.0,
            SHIFTED=shifted,
            BLOCK_ROWS=rows,
            BLOCK_COLUMNS=columns,
        )


@triton.jit
def softmax_statistics_kernel(
    tile,  # launch.LogitTile, [rows, num_columns] float32
    target_ids,  # [rows]
    logsumexp,  # [rows]
    target_logits,  # [rows]
    num_columns,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Log-sum-exp and target logit of a complete float32 row. One program a row, one read."""
    row = tl.program_id(0)
    target = tl.load(target_ids + row)
    source = tile.logits + row.to(tl.int64) * tile.stride
    highest = tl.full([BLOCK_COLUMNS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        mask = columns < num_columns
        z = apply_softcap(tl.load(source + columns, mask=mask, other=0.0), tile.tanh_scale)
        z = tl.where(mask, z, -float("inf"))
        higher = tl.maximum(highest, z)
        # A lane that has seen nothing yet holds -inf, and -inf - -inf is no number.
        seen = higher > -float("inf")
        total = tl.where(seen, total * exp(highest - higher) + exp(z - higher), total)
        total = tl.where(z != z, z, total)
        highest = higher
    top = tl.max(highest, 0)
    tl.store(logsumexp + row, top + tl.log(tl.sum(total * exp(highest - top), 0)))
    tl.store(target_logits + row, apply_softcap(tl.load(source + target), tile.tanh_scale))


def softmax_statistics(tile: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor) -> SoftmaxRows:
    """Statistics of the complete rows of a float32 tile, [rows, V]; `target_ids` is [rows]."""
    result = SoftmaxRows(tile.new_empty(tile.shape[0]), tile.new_empty(tile.shape[0]))
    with on_device(tile):
        launch_variant(
            softmax_statistics_kernel,
            (tile.shape[0],),
            LogitTile.of(tile, transform),
            target_ids.contiguous(),
            *result,
            tile.shape[1],
            BLOCK_COLUMNS=min(LONG_COLUMNS, next_power_of_2(tile.shape[1])),
            num_warps=8,
        )
    return result


@triton.jit(do_not_specialize=COUNTS)
def score_gradient_kernel(
    tile,  # launch.LogitTile, [num_rows, num_columns] float32
    gradient,  # [num_rows, num_columns]; may be the tile
    logsumexp,  # [rows]
    target_ids,  # [rows]
    logprob_weight,  # [rows], or None for zero
    logsumexp_weight,  # [rows], or None for zero
    entropy,  # [rows], for `entropy_weight`
    entropy_weight,  # [rows], or None for zero
    num_rows,
    num_columns,
    gradient_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The gradient of `sum_n` weight times log-probability, log-sum-exp and entropy.

    d logp_y / dz = 1[y] - p,   d logsumexp / dz = p,   d entropy / dz = -p (log p + entropy)
    """
    block, row_block = tile_block(num_columns, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(tile.logits + wide * tile.stride + columns[None, :], mask=mask, other=0.0)
    z = apply_softcap(x, tile.tanh_scale)
    logprob = z - tl.load(logsumexp + rows, mask=row_mask, other=0.0)[:, None]
    p = exp(logprob)
    of_p = tl.zeros([BLOCK_ROWS], tl.float32)
    if logsumexp_weight is not None:
        of_p += tl.load(logsumexp_weight + rows, mask=row_mask, other=0.0)
    if logprob_weight is not None:
        of_logprob = tl.load(logprob_weight + rows, mask=row_mask, other=0.0)
        of_p -= of_logprob
    result = p * of_p[:, None]
    if entropy_weight is not None:
        of_entropy = tl.load(entropy_weight + rows, mask=row_mask, other=0.0)
        row_entropy = tl.load(entropy + rows, mask=row_mask, other=0.0)
        result -= of_entropy[:, None] * p * (logprob + row_entropy[:, None])
    if logprob_weight is not None:
        targets = tl.load(target_ids + rows, mask=row_mask, other=-1).to(tl.int32)
        result += tl.where(columns[None, :] == targets[:, None], of_logprob[:, None], 0.0)
    if tile.tanh_scale is not None:
        result *= softcap_gradient(z, tile.tanh_scale)
    tl.store(gradient + wide * gradient_stride + columns[None, :], result.to(gradient.dtype.element_ty), mask=mask)


def write_score_gradient(
    logits: torch.Tensor,
    gradient: torch.Tensor,
    transform: LogitTransform,
    target_ids: torch.Tensor,
    scores: Scores,
    grads: ScoreGrads,
) -> None:
    """See `unisd_kernels.backends.base.Backend.score_backward`."""
    with on_device(logits):
        launch_variant(
            score_gradient_kernel,
            tile_grid(logits, TILE_ROWS, TILE_COLUMNS),
            LogitTile.of(logits, transform),
            gradient,
            scores.logsumexp.contiguous(),
            target_ids.contiguous(),
            contiguous(grads.logprobs),
            contiguous(grads.logsumexp),
            contiguous(scores.entropy),
            contiguous(grads.entropy),
            *logits.shape,
            gradient.stride(0),
            BLOCK_ROWS=TILE_ROWS,
            BLOCK_COLUMNS=TILE_COLUMNS,
        )
