"""Scoring: a matrix product with an online log-sum-exp behind it. No logit reaches memory.

Each program keeps a block of rows and walks a span of the vocabulary; the spans of one row are merged at the end. There
are as many spans as it takes to fill the device, so 64 rows keep it as busy as 32768. Rows that run at the same time
walk the same span, and so share the weight in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unisd_kernels.backends.triton.gemm import gemm_tile
from unisd_kernels.backends.triton.math import COUNTS, apply_softcap, exp
from unisd_kernels.backends.triton.statistics import MASKED


@triton.jit(do_not_specialize=COUNTS)
def score_kernel(
    hidden,
    weight,
    bias,
    span_logsumexp,  # [spans, rows]
    span_entropy,  # [spans, rows]: of the softmax over the span
    num_rows,
    num_columns,
    width,
    hidden_stride,
    weight_stride,
    blocks_per_span,
    num_spans,
    product_scale,
    tanh_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    program = tl.program_id(0)
    group = program // (GROUP * num_spans)
    blocks_in_group = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = program - group * GROUP * num_spans
    first_row = (group * GROUP + within % blocks_in_group) * BLOCK_ROWS
    span = within // blocks_in_group

    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_rows
    highest = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS], tl.float32)
    first_block = span * blocks_per_span
    last_block = tl.minimum(first_block + blocks_per_span, tl.cdiv(num_columns, BLOCK_COLUMNS))
    for block in tl.range(first_block, last_block, warp_specialize=WARP_SPECIALIZE):
        first_column = block * BLOCK_COLUMNS
        sums = gemm_tile(
            hidden,
            weight,
            first_row,
            num_rows,
            first_column,
            num_columns,
            width,
            hidden_stride,
            weight_stride,
            DESCRIPTORS,
            EVEN_WIDTH,
            PRECISION,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_WIDTH,
        )
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        if HAS_BIAS:
            sums += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
        z = apply_softcap(sums * product_scale, tanh_scale, HAS_SOFTCAP)
        z = tl.where(columns[None, :] < num_columns, z, MASKED)
        higher = tl.maximum(highest, tl.max(z, 1))
        rescale = exp(highest - higher)
        exponentials = exp(z - higher[:, None])
        if WANT_ENTROPY:
            # Relative to the highest logit: of large logits the entropy needs the spread, not the mean.
            moved = tl.where(total > 0.0, weighted + (highest - higher) * total, 0.0)
            weighted = moved * rescale + tl.sum(exponentials * (z - higher[:, None]), 1)
        total = total * rescale + tl.sum(exponentials, 1)
        highest = higher

    tl.store(span_logsumexp + span * num_rows + rows, highest + tl.log(total), mask=row_mask)
    if WANT_ENTROPY:
        tl.store(span_entropy + span * num_rows + rows, tl.log(total) - weighted / total, mask=row_mask)
