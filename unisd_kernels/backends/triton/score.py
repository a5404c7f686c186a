"""Scoring: a matrix product with an online log-sum-exp behind it. No logit reaches memory.

Each program keeps a block of rows and walks a split of the vocabulary; the splits of one row are merged at the end.
There are as many splits as it takes to fill the device (`vocab_splits`), so 64 rows keep it as busy as 32768. Rows that
run at the same time walk the same split, and so share the weight in the cache.

A pass over the columns keeps, per row, the highest logit m, `s = sum e^(z - m)` and, for an entropy, `w = sum (z - m)
e^(z - m)`. When a block raises m by d, `s <- s e^-d` and `w <- (w - d s) e^-d`: the sum's reference moves with m. Then

    log sum e^z = m + log s,      entropy = -sum p log p = log s - w / s

and neither m nor the mean logit, which may be hundreds, is a term of the entropy. The splits i of a row merge in the
same way: with `pi_i = e^(L_i - L)` of their log-sum-exps L_i, `entropy = sum pi_i (entropy_i - log pi_i)`, that of each
split plus that of the choice among them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from unisd_kernels.backends.base import RunningScores
from unisd_kernels.backends.buffers import contiguous, row_major
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.triton.configs import GemmConfig, choose, with_loads
from unisd_kernels.backends.triton.gemm import Side, gemm_tile
from unisd_kernels.backends.triton.launch import ceil_div, gemm_operands, num_sms, on_device
from unisd_kernels.backends.triton.math import COUNTS, apply_softcap, exp
from unisd_kernels.backends.triton.rows import target_block, target_logit
from unisd_kernels.backends.triton.statistics import MASKED


@triton.jit(do_not_specialize=COUNTS)
def score_kernel(
    hidden,  # [num_rows, H]
    weight,  # [num_columns, H]
    side,  # gemm.Side
    split_logsumexp,  # [splits, rows]
    split_entropy,  # [splits, rows] of the softmax over the split, or None
    num_rows,
    num_columns,
    blocks_per_split,
    num_splits,
    DESCRIPTORS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs start in the order of their numbers: GROUP blocks of rows walk a split side by side, then those of the
    # next split, so that a group reads the weight from memory once and holds its hidden states in the L2: 8 MB for 8
    # blocks at H = 4096 in 16 bits. Of 2048 rows all programs run at a time, whatever the group.
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    program = tl.program_id(0)
    group = program // (GROUP * num_splits)
    blocks_in_group = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = program - group * GROUP * num_splits
    first_row = (group * GROUP + within % blocks_in_group) * BLOCK_ROWS
    split = within // blocks_in_group

    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_rows
    highest = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS], tl.float32)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(num_columns, BLOCK_COLUMNS))
    for block in tl.range(first_block, last_block, warp_specialize=WARP_SPECIALIZE):
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
        z = apply_softcap(sums * side.scale, side.tanh_scale)
        z = tl.where(columns[None, :] < num_columns, z, MASKED)
        higher = tl.maximum(highest, tl.max(z, 1))
        rescale = exp(highest - higher)
        exponentials = exp(z - higher[:, None])
        if split_entropy is not None:
            # Of the first block `highest` is -inf, and -inf times a total of 0 is no number.
            moved = tl.where(total > 0.0, weighted + (highest - higher) * total, 0.0)
            weighted = moved * rescale + tl.sum(exponentials * (z - higher[:, None]), 1)
        total = total * rescale + tl.sum(exponentials, 1)
        highest = higher

    tl.store(split_logsumexp + split * num_rows + rows, highest + tl.log(total), mask=row_mask)
    if split_entropy is not None:
        tl.store(split_entropy + split * num_rows + rows, tl.log(total) - weighted / total, mask=row_mask)


@triton.jit(do_not_specialize=COUNTS)
def finish_scores_kernel(
    hidden,  # [num_rows, H]
    weight,  # [num_columns, H]
    side,  # gemm.Side
    target_ids,  # [rows]
    split_logsumexp,  # [splits, rows]
    split_entropy,  # [splits, rows], or None
    logsumexp,  # [rows]
    entropy,  # [rows], or None
    target_logits,  # [rows]
    num_rows,
    num_splits,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Merge a row's splits and make its target's logit. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    logit = target_logit(hidden, weight, side, None, target_ids, row, BLOCK_WIDTH)
    tl.store(target_logits + row, logit)
    highest = tl.full([BLOCK_SPLITS], -float("inf"), tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        splits = start + tl.arange(0, BLOCK_SPLITS)
        part = tl.load(split_logsumexp + splits * num_rows + row, mask=splits < num_splits, other=-float("inf"))
        highest = tl.maximum(highest, part)
    top = tl.max(highest, 0)
    shares = tl.zeros([BLOCK_SPLITS], tl.float32)
    spreads = tl.zeros([BLOCK_SPLITS], tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        splits = start + tl.arange(0, BLOCK_SPLITS)
        mask = splits < num_splits
        away = tl.load(split_logsumexp + splits * num_rows + row, mask=mask, other=-float("inf")) - top
        share = exp(away)
        shares += share
        if split_entropy is not None:
            of_split = tl.load(split_entropy + splits * num_rows + row, mask=mask, other=0.0)
            # Of a split that is not there, or of no probability: 0 times its infinite distance is no number.
            spreads += share * (of_split - tl.where(share == 0.0, 0.0, away))
    total = tl.sum(shares, 0)
    tl.store(logsumexp + row, top + tl.log(total))
    if split_entropy is not None:
        tl.store(entropy + row, tl.sum(spreads, 0) / total + tl.log(total))


@functools.cache
def vocab_splits(row_blocks: int, column_blocks: int, programs: int) -> int:
    """Number of splits of the vocabulary with which the rows' blocks times splits fill a device that runs `programs` at
    a time.

    Minimizes the number of rounds times the blocks in a split; each round also pays about one block for starting.
    """
    best, least = 1, float("inf")
    for splits in range(1, min(column_blocks, 4 * programs) + 1):
        rounds = -(-row_blocks * splits // programs)
        cost = rounds * (-(-column_blocks // splits) + 1)
        if cost < least:
            best, least = splits, cost
    return best


def score(projection: Projection, target_ids: torch.Tensor, running: RunningScores) -> None:
    """Write the statistics of all of a projection's rows, [rows] each; `target_ids` is [rows]."""
    hidden, weight = row_major(projection.hidden), row_major(projection.weight)
    projection = Projection(hidden, weight, contiguous(projection.bias), projection.transform)
    num_rows, num_columns, device = hidden.shape[0], projection.num_columns, hidden.device
    want_entropy = running.entropy is not None

    def launch(config: GemmConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
        row_blocks, column_blocks = ceil_div(num_rows, config.rows), ceil_div(num_columns, config.columns)
        splits = vocab_splits(row_blocks, column_blocks, config.occupancy * num_sms(device))
        blocks_per_split = ceil_div(column_blocks, splits)
        splits = ceil_div(column_blocks, blocks_per_split)
        logsumexp = torch.empty(splits, num_rows, dtype=torch.float32, device=device)
        entropy = torch.empty_like(logsumexp) if want_entropy else None
        operands, constants = gemm_operands(config, (hidden,), (weight,))
        score_kernel[(row_blocks * splits,)](
            *operands,
            Side.of(projection),
            logsumexp,
            entropy,
            num_rows,
            num_columns,
            blocks_per_split,
            splits,
            GROUP=config.group,
            **constants,
        )
        return logsumexp, entropy

    with on_device(hidden):
        shape = (num_rows, num_columns, hidden.shape[1])
        split_logsumexp, split_entropy = launch(choose(_kind(projection, want_entropy), device, shape, launch))
        finish_scores_kernel[(num_rows,)](
            hidden,
            weight,
            Side.of(projection),
            target_ids.contiguous(),
            split_logsumexp,
            split_entropy,
            running.logsumexp,
            running.entropy if want_entropy else None,
            running.target_logits,
            num_rows,
            split_logsumexp.shape[0],
            BLOCK_SPLITS=32,
            BLOCK_WIDTH=target_block(hidden.shape[1]),
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
