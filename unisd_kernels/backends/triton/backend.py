"""The Triton backend: NVIDIA GPUs, and AMD's and Intel's as far as Triton carries; the CPU under its interpreter.

Scores come from a product kernel that keeps the logits in registers. For a divergence there are two designs, fused and
chunked (`docs/gpu.md` compares them); `TritonBackend.divergence` chooses.

Nothing here waits for the device.
"""

from __future__ import annotations

import torch

from unisd_kernels.backends.base import Divergence, NeedsGrad, RunningScores, ScoreGrads, Scores, SoftmaxRows
from unisd_kernels.backends.buffers import equal_tiles, rows_of, whole_tiles
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.backends.triton.chunked_divergence import ChunkedDivergence
from unisd_kernels.backends.triton.fused_divergence import FusedDivergence
from unisd_kernels.backends.triton.gradients import softmax_statistics, write_score_gradient
from unisd_kernels.backends.triton.launch import ROW_PADDING, interpreting
from unisd_kernels.backends.triton.rows import scale_rows
from unisd_kernels.backends.triton.score import score


class TritonBackend:
    """Triton's kernels as a `unisd_kernels.backends.base.Backend`.

    Args:
        design: "fused" or "chunked" to insist on one; None for the default of the device.
    """

    name = "triton"
    stacks_views = True
    score_asserts_ids = True
    row_padding = ROW_PADDING

    def __init__(self, design: str | None = None) -> None:
        self._design = design

    def chunk_rows(self, num_rows: int, most: int, weight_gradient: bool) -> int:
        return equal_tiles(num_rows, whole_tiles(most))

    def block_rows(self, num_columns: int, device: torch.device) -> None:
        return None

    def gradient_dtype(self, projection: Projection) -> torch.dtype:
        """Dtype of the operands, in which the gradient enters its products."""
        _check_interpretable(projection)
        return projection.hidden.dtype

    def logits(self, projection: Projection, rows: slice, out: torch.Tensor) -> None:
        _check_interpretable(projection)
        projection.logits(rows, out)

    def hidden_gradient(self, projection: Projection, gradient: torch.Tensor, out: torch.Tensor) -> None:
        projection.hidden_gradient(gradient, out)

    def add_weight_gradient(
        self, projection: Projection, gradient: torch.Tensor, rows: slice, out: torch.Tensor, first: bool
    ) -> None:
        projection.add_weight_gradient(gradient, rows, out, first)

    def score(
        self, projection: Projection, rows: slice, target_ids: torch.Tensor, running: RunningScores, tile_bytes: int
    ) -> None:
        _check_interpretable(projection)
        score(projection.of_rows(rows_of(projection.hidden, rows)), target_ids, running)

    def divergence(
        self,
        student: Projection,
        teacher: Projection,
        beta: float,
        workspace_bytes: int,
        needs_grad: NeedsGrad,
        unit_weights: bool,
    ) -> Divergence:
        """Fused for 16-bit operands through one head. Chunked for everything else: float32 operands, two heads, which
        share no tile, in either design a JSD without a gradient, which the fused one would take of rounded numbers, and
        slices of a vocabulary, whose statistics the ranks exchange before the gradient.

        Raises:
            ValueError: the fused design was asked for by name, and the heads are slices of a vocabulary.
        """
        _check_interpretable(student)
        _check_interpretable(teacher)
        narrow = all(p.hidden.dtype in (torch.float16, torch.bfloat16) for p in (student, teacher))
        one_weight = narrow and student.weight_is(teacher)
        fused = one_weight if self._design is None else self._design == "fused"
        if student.shard is not None:
            if self._design == "fused":
                raise ValueError(
                    "impl='triton_fused' takes no vocabulary-parallel head: give impl='triton' or 'triton_chunked', "
                    "which exchange statistics between the products and the gradient"
                )
            fused = False
        fused = fused and (beta in (0.0, 1.0) or needs_grad.any)
        design = FusedDivergence if fused else ChunkedDivergence
        return design(student, teacher, beta, workspace_bytes, needs_grad)

    def softmax(
        self, logits: torch.Tensor, gradient: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor
    ) -> SoftmaxRows:
        result = softmax_statistics(logits, transform, target_ids)
        scores = Scores(result.logsumexp, result.logsumexp, None)
        ones = ScoreGrads(None, torch.ones_like(result.logsumexp), None)
        write_score_gradient(logits, gradient, transform, target_ids, scores, ones)
        return result

    score_backward = staticmethod(write_score_gradient)
    scale_rows = staticmethod(scale_rows)


def _check_interpretable(projection: Projection) -> None:
    """Refuse bfloat16 under Triton's interpreter, which multiplies the bits of such numbers as if they were integers.

    Here and not in the dispatch, because what reaches the kernels is known after autocast, and each view may have its
    own dtype.
    """
    if interpreting() and torch.bfloat16 in (projection.hidden.dtype, projection.weight.dtype):
        raise TypeError(
            "Triton's interpreter (TRITON_INTERPRET=1) computes wrong products of torch.bfloat16; use torch.float32 or "
            "torch.float16 operands, or impl='torch'"
        )
