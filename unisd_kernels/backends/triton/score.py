"""Scoring: a matrix product with the log-sum-exp of its tile behind it. No logit reaches memory.

As many programs as the device runs at a time each take every so-many-th tile, those of the same columns side by side,
which so share the weight in the cache: 64 rows keep a device as busy as 2048, and none waits for more than one tile at
the end. Of each tile a row's log-sum-exp, and its entropy if wanted, go to memory: 4 bytes for 256 logits. A kernel
merges them.

With m the highest logit of a tile, `s = sum e^(z - m)` and `w = sum (z - m) e^(z - m)`

    log sum e^z = m + log s,      entropy = -sum p log p = log s - w / s

and neither m nor the mean logit, which may be hundreds, is a term of the entropy. The blocks i of a row merge with
`pi_i = e^(L_i - L)` of their log-sum-exps L_i: `entropy = sum pi_i (entropy_i - log pi_i)`, that of each block plus
that of the choice among them. Logits are in units of log 2 inside, so that an exponential is one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.base import RunningScores
from unisd_kernels.backends.buffers import contiguous, row_major
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.configs import GemmConfig, choose, with_loads
from unisd_kernels.backends.triton.gemm import Side, gemm_tile
from unisd_kernels.backends.triton.launch import ceil_div, gemm_operands, next_power_of_2, num_sms, on_device
from unisd_kernels.backends.triton.math import COUNTS, apply_softcap, exp
from unisd_kernels.backends.triton.rows import target_block, target_logit
from unisd_kernels.backends.triton.statistics import MASKED
from unisd_kernels.backends.triton.variants import launch_variant

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# Blocks of a row that are merged at a time.
_MERGED_BLOCKS = 512
# Options of a launch with assertions, which Triton leaves out otherwise; but not those it would add to every sum.
ASSERTING = {"debug": True, "sanitize_overflow": False}


@triton.jit(do_not_specialize=COUNTS)
def score_kernel(
    hidden,  # [num_rows, H]
    weight,  # [num_columns, H]
    side,  # gemm.Side
    block_logsumexp,  # [rows, blocks]
    block_entropy,  # [rows, blocks] of the softmax over the block, or None
    num_rows,
    num_columns,
    num_blocks,
    num_programs,
    EVEN_COLUMNS: tl.constexpr,  # does the vocabulary end with a tile?
    DESCRIPTORS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), row_blocks * num_blocks, num_programs, warp_specialize=WARP_SPECIALIZE):
        # Tiles of the same columns run together: the weight comes from memory once, the hidden states stay cached.
        first_row = (tile % row_blocks) * BLOCK_ROWS
        block = tile // row_blocks
        first_column = block * BLOCK_COLUMNS
        sums = gemm_tile(
            hidden,
            weight,
            side,
            first_row,
            num_rows,
            first_column,
            num_columns,
            DESCRIPTORS,
            EVEN_WIDTH,
            PRECISION,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_WIDTH,
        )
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        if side.bias is not None:
            sums += tl.load(side.bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
        if side.tanh_scale is not None:
            z = apply_softcap(sums * side.scale, side.tanh_scale) * _LOG2_E
        else:
            z = apply_softcap(sums * (side.scale * _LOG2_E), None)
        if not EVEN_COLUMNS:
            z = tl.where(columns[None, :] < num_columns, z, MASKED)
        highest = tl.max(z, 1)
        exponentials = tl.exp2(z - highest[:, None])
        total = tl.sum(exponentials, 1)
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        row_mask = rows < num_rows
        out = rows * num_blocks + block
        log_total = tl.log(total)
        tl.store(block_logsumexp + out, highest * _LN_2 + log_total, mask=row_mask)
        if block_entropy is not None:
            weighted = tl.sum(exponentials * (z - highest[:, None]), 1) * _LN_2
            tl.store(block_entropy + out, log_total - weighted / total, mask=row_mask)


@triton.jit(do_not_specialize=COUNTS)
def finish_scores_kernel(
    hidden,  # [num_rows, H]
    weight,  # [num_columns, H]
    side,  # gemm.Side
    target_ids,  # [rows]
    block_logsumexp,  # [rows, blocks]
    block_entropy,  # [rows, blocks], or None
    logsumexp,  # [rows]
    entropy,  # [rows], or None
    target_logits,  # [rows]
    num_columns,
    num_blocks,
    BLOCKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Merge a row's blocks and make its target's logit. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ids + row)
    tl.device_assert((target >= 0) & (target < num_columns), "target_ids outside of [0, number of columns)")
    logit = target_logit(hidden, weight, side, None, target_ids, row, BLOCK_WIDTH)
    tl.store(target_logits + row, logit)
    highest = tl.full([BLOCKS], -float("inf"), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        part = tl.load(block_logsumexp + row * num_blocks + blocks, mask=blocks < num_blocks, other=-float("inf"))
        highest = tl.maximum(highest, part)
    top = tl.max(highest, 0)
    shares = tl.zeros([BLOCKS], tl.float32)
    spreads = tl.zeros([BLOCKS], tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        mask = blocks < num_blocks
        away = tl.load(block_logsumexp + row * num_blocks + blocks, mask=mask, other=-float("inf")) - top
        share = exp(away)
        shares += share
        if block_entropy is not None:
            of_block = tl.load(block_entropy + row * num_blocks + blocks, mask=mask, other=0.0)
            # Of a block that is not there, or of no probability: 0 times its infinite distance is no number.
            spreads += share * (of_block - tl.where(share == 0.0, 0.0, away))
    total = tl.sum(shares, 0)
    tl.store(logsumexp + row, top + tl.log(total))
    if block_entropy is not None:
        tl.store(entropy + row, tl.sum(spreads, 0) / total + tl.log(total))


def score(projection: Projection, target_ids: torch.Tensor, running: RunningScores) -> None:
    """Write the statistics of all of a projection's rows, [rows] each; `target_ids` is [rows]. An id outside the
    columns is an assertion of the device."""
    hidden, weight, bias = row_major(projection.hidden), row_major(projection.weight), contiguous(projection.bias)
    if hidden is not projection.hidden or weight is not projection.weight or bias is not projection.bias:
        projection = Projection(hidden, weight, bias, projection.transform)
    side = Side.of(projection)
    (num_rows, width), num_columns, device = hidden.shape, weight.shape[0], hidden.device
    want_entropy = running.entropy is not None

    def launch(config: GemmConfig) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        num_blocks = ceil_div(num_columns, config.columns)
        logsumexp = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=device)
        entropy = torch.empty_like(logsumexp) if want_entropy else None
        operands, constants = gemm_operands(config, (hidden,), (weight,))
        programs = min(ceil_div(num_rows, config.rows) * num_blocks, config.occupancy * num_sms(device))
        launch_variant(
            score_kernel,
            (programs,),
            *operands,
            side,
            logsumexp,
            entropy,
            num_rows,
            num_columns,
            num_blocks,
            programs,
            EVEN_COLUMNS=num_columns % config.columns == 0,
            **constants,
        )
        return logsumexp, entropy, num_blocks

    with on_device(hidden):
        config = choose(_kind(projection, want_entropy), device, (num_rows, num_columns, width), launch)
        block_logsumexp, block_entropy, num_blocks = launch(config)
        launch_variant(
            finish_scores_kernel,
            (num_rows,),
            hidden,
            weight,
            side,
            target_ids.contiguous(),
            block_logsumexp,
            block_entropy,
            running.logsumexp,
            running.entropy,
            running.target_logits,
            num_columns,
            num_blocks,
            BLOCKS=min(_MERGED_BLOCKS, next_power_of_2(num_blocks)),
            BLOCK_WIDTH=target_block(width),
            **ASSERTING,
        )


def _kind(projection: Projection, want_entropy: bool) -> str:
    """The kind of tile (`configs.py`)."""
    if projection.hidden.dtype == torch.float32:
        return "score-float32"
    kind = "score"
    if projection.hidden.shape[0] <= 64:
        kind = "score-few"
    elif want_entropy or projection.transform.softcap is not None:
        kind = "score-heavy"
    return with_loads(kind, projection.hidden, projection.weight)
