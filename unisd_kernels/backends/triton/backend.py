"""The Triton backend: NVIDIA GPUs, and AMD's and Intel's as far as Triton carries; the CPU under its interpreter.

Scores come from a product kernel that keeps the logits in registers. For a divergence there are two designs
(`docs/gpu.md` compares them):

- fused (`fused_divergence.py`): one product kernel for student and teacher, whose statistics are taken in registers and
  whose logits are stored in 16 bits relative to a reference, for the gradient alone. For the two KLs with 16-bit
  operands and one head.
- chunked: library products into float32 tiles, statistics in one read, gradients in one read and one write. Everything
  else: the JSD, whose sums need the log-sum-exps first, float32 operands, and two heads, which share no tile.

Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton

from unisd_kernels.backends.base import Divergence, NeedsGrad, RunningScores, ScoreGrads, Scores, SoftmaxRows
from unisd_kernels.backends.buffers import contiguous, equal_tiles, row_major, whole_tiles
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.backends.triton import gradients, score
from unisd_kernels.backends.triton import rows as row_kernels
from unisd_kernels.backends.triton.configs import GemmConfig, choose, with_loads
from unisd_kernels.backends.triton.divergence import ChunkedDivergence, FusedDivergence, target_logits
from unisd_kernels.backends.triton.launch import (
    LONG_COLUMNS,
    ROW_PADDING,
    TILE_COLUMNS,
    TILE_ROWS,
    interpreting,
    matrices_or_descriptors,
    num_sms,
    on_device,
    product_precision,
    tile_grid,
    vocab_splits,
)


class TritonBackend:
    """See `unisd_kernels.backends.base.Backend`.

    Args:
        design: "fused" or "chunked" to insist on one for the KLs; None for the default of the device.
    """

    name = "triton"
    stacks_views = True
    row_padding = ROW_PADDING

    def __init__(self, design: str | None = None) -> None:
        self._design = design

    def chunk_rows(self, num_rows: int, most: int, weight_gradient: bool) -> int:
        return equal_tiles(num_rows, whole_tiles(most))

    def block_rows(self, num_columns: int, device: torch.device) -> None:
        return None

    def gradient_dtype(self, projection: Projection) -> torch.dtype:
        """The operands', in which the gradient enters its products."""
        _check_interpretable(projection)
        return projection.hidden.dtype

    def logits(self, projection: Projection, rows: slice, out: torch.Tensor) -> None:
        _check_interpretable(projection)
        projection.logits(rows, out)

    def hidden_gradient(self, projection: Projection, gradient: torch.Tensor, out: torch.Tensor) -> None:
        projection.hidden_gradient(gradient, out)

    def score(
        self, projection: Projection, rows: slice, target_ids: torch.Tensor, running: RunningScores, tile_bytes: int
    ) -> None:
        _check_interpretable(projection)
        hidden, weight = row_major(projection.hidden[rows]), row_major(projection.weight)
        num_rows, width = hidden.shape
        num_columns, transform = projection.num_columns, projection.transform
        bias = None if projection.bias is None else projection.bias.contiguous()
        target_ids = target_ids.contiguous()
        want_entropy = running.entropy is not None
        kind = "score"
        if hidden.dtype == torch.float32:
            kind = "score-float32"
        elif num_rows <= 64:
            kind = "score-few"
        elif want_entropy or transform.tanh_scale is not None:
            kind = "score-heavy"
        if hidden.dtype != torch.float32:
            kind = with_loads(kind, hidden, weight)

        def run(config: GemmConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
            row_blocks = triton.cdiv(num_rows, config.rows)
            column_blocks = triton.cdiv(num_columns, config.columns)
            spans = vocab_splits(row_blocks, column_blocks, config.occupancy * num_sms(hidden.device))
            blocks_per_span = triton.cdiv(column_blocks, spans)
            spans = triton.cdiv(column_blocks, blocks_per_span)
            partial = torch.empty(spans, num_rows, dtype=torch.float32, device=hidden.device)
            partial_entropy = torch.empty_like(partial) if want_entropy else None
            operands, with_descriptors = matrices_or_descriptors(
                config.descriptors, config.width, (hidden, config.rows), (weight, config.columns)
            )
            score.score_kernel[(row_blocks * spans,)](
                *operands,
                bias,
                partial,
                partial_entropy,
                num_rows,
                num_columns,
                width,
                hidden.stride(0),
                weight.stride(0),
                blocks_per_span,
                spans,
                transform.product_scale,
                transform.tanh_scale or 1.0,
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=transform.tanh_scale is not None,
                WANT_ENTROPY=want_entropy,
                DESCRIPTORS=with_descriptors,
                EVEN_WIDTH=width % config.width == 0,
                PRECISION=product_precision(hidden),
                WARP_SPECIALIZE=config.warp_specialize and with_descriptors,
                BLOCK_ROWS=config.rows,
                BLOCK_COLUMNS=config.columns,
                BLOCK_WIDTH=config.width,
                GROUP=config.group,
                num_warps=config.warps,
                num_stages=config.stages,
            )
            return partial, partial_entropy

        with on_device(hidden):
            partial, partial_entropy = run(choose(kind, hidden.device, (num_rows, num_columns, width), run))
            target_logits(Projection(hidden, weight, bias, transform), None, target_ids, running.target_logits)
            torch.logsumexp(partial, 0, out=running.logsumexp)
            if running.entropy is not None:
                assert partial_entropy is not None
                # The entropy of the spans and of the choice among them.
                log_share = partial.log_softmax(0)
                torch.sum(log_share.exp().mul_(partial_entropy - log_share), 0, out=running.entropy)

    def scale_rows(self, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        if not out.numel():
            return out
        columns = min(1024, triton.next_power_of_2(rows.shape[1]))
        with on_device(rows):
            row_kernels.scale_rows_kernel[(rows.shape[0], triton.cdiv(rows.shape[1], columns))](
                rows, scale.contiguous(), out, rows.shape[1], rows.stride(0), out.stride(0), BLOCK_COLUMNS=columns
            )
        return out

    def divergence(
        self, student: Projection, teacher: Projection, beta: float, workspace_bytes: int, needs_grad: NeedsGrad
    ) -> Divergence:
        _check_interpretable(student)
        _check_interpretable(teacher)
        narrow = all(p.hidden.dtype in (torch.float16, torch.bfloat16) for p in (student, teacher))
        one_weight = narrow and student.weight_is(teacher)
        fused = beta in (0.0, 1.0) and (one_weight if self._design is None else self._design == "fused")
        design = FusedDivergence if fused else ChunkedDivergence
        return design(student, teacher, beta, workspace_bytes, needs_grad)

    def softmax(
        self, logits: torch.Tensor, gradient: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor
    ) -> SoftmaxRows:
        tile = logits
        result = SoftmaxRows(tile.new_empty(tile.shape[0]), tile.new_empty(tile.shape[0]))
        with on_device(tile):
            gradients.softmax_statistics_kernel[(tile.shape[0],)](
                tile,
                target_ids.contiguous(),
                *result,
                tile.shape[1],
                tile.stride(0),
                transform.tanh_scale or 1.0,
                HAS_SOFTCAP=transform.tanh_scale is not None,
                BLOCK_COLUMNS=min(LONG_COLUMNS, triton.next_power_of_2(tile.shape[1])),
                num_warps=8,
            )
        ones = torch.ones_like(result.logsumexp)
        scores = Scores(result.logsumexp, result.logsumexp, None)
        self.score_backward(tile, gradient, transform, target_ids, scores, ScoreGrads(None, ones, None))
        return result

    def score_backward(
        self,
        logits: torch.Tensor,
        gradient: torch.Tensor,
        transform: LogitTransform,
        target_ids: torch.Tensor,
        scores: Scores,
        grads: ScoreGrads,
    ) -> None:
        tile = logits
        with on_device(tile):
            gradients.logprob_gradient_kernel[tile_grid(tile, TILE_ROWS, TILE_COLUMNS)](
                tile,
                gradient,
                scores.logsumexp.contiguous(),
                target_ids.contiguous(),
                contiguous(grads.logprobs),
                contiguous(grads.logsumexp),
                contiguous(scores.entropy),
                contiguous(grads.entropy),
                *tile.shape,
                tile.stride(0),
                gradient.stride(0),
                transform.tanh_scale or 1.0,
                HAS_SOFTCAP=transform.tanh_scale is not None,
                HAS_LOGPROB_WEIGHT=grads.logprobs is not None,
                HAS_LOGSUMEXP_WEIGHT=grads.logsumexp is not None,
                HAS_ENTROPY_WEIGHT=grads.entropy is not None,
                BLOCK_ROWS=TILE_ROWS,
                BLOCK_COLUMNS=TILE_COLUMNS,
            )


def _check_interpretable(projection: Projection) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers. Here and not in the
    dispatch, because what reaches the kernels is known after autocast, and each view may have its own dtype."""
    if interpreting() and torch.bfloat16 in (projection.hidden.dtype, projection.weight.dtype):
        raise TypeError(
            "Triton's interpreter (TRITON_INTERPRET=1) computes wrong products of torch.bfloat16; use torch.float32 or "
            "torch.float16 operands, or impl='torch'"
        )
