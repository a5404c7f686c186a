"""The C++ backend (csrc/cpu): float32 arithmetic, vectorized and threaded, with its own matrix products.

The products read the weight where it lies, so small chunks cost no more than large ones, and scores never leave the
first-level cache. Results are the same bits for any number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from unisd_kernels.backends import extension
from unisd_kernels.backends.base import (
    DivergenceRows,
    LogitPair,
    NeedsGrad,
    RunningScores,
    ScoreGrads,
    Scores,
    ShardRows,
    SoftmaxRows,
    WholeRows,
)
from unisd_kernels.backends.buffers import contiguous, row_major
from unisd_kernels.backends.logit_divergence import LogitDivergence
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.transform import LogitTransform

# The rows of `statistics` (csrc/cpu/statistics.h).
_DIVERGENCE, _STUDENT_LOGPROB, _TEACHER_LOGPROB, _STUDENT_ENTROPY, _TEACHER_ENTROPY = range(5)
_STUDENT_MAX, _STUDENT_LOG_SUM, _TEACHER_MAX, _TEACHER_LOG_SUM, _STUDENT_TO_MIXTURE, _LOG_RATIO = range(5, 11)
_NUM_STATISTICS = 11

# Rows of hidden states go through the product in panels of 64 with AVX-512 (of 48 in bfloat16), the last one lower by
# multiples of 16, and of 16 with AVX2.
_PANEL_STEP = 16
# More rows in a chunk make our products no faster.
_MOST_ROWS = 144


class SavedDivergence(NamedTuple):
    """Values for `divergence_of_logits_backward`, which writes into the student's tile."""

    logits: LogitPair
    tanh_scale: float | None  # the student's
    beta: float
    statistics: torch.Tensor  # [_NUM_STATISTICS, rows]


class NativeBackend:
    """C++ operations on logits (`base.LogitBackend`)."""

    name = "native"
    stacks_views = False
    score_asserts_ids = False
    takes_delta = True
    joins_gradient = True
    # A row of logits is often a multiple of 4096 bytes long, so that the same column of all rows falls into one set of
    # the cache; one cache line more, and it does not.
    row_padding = 16

    def chunk_rows(self, num_rows: int, most: int, weight_gradient: bool) -> int:
        rows = most if weight_gradient else min(most, _MOST_ROWS)
        if num_rows <= rows:
            return num_rows
        return rows if rows < _PANEL_STEP else rows // _PANEL_STEP * _PANEL_STEP

    def multiplies_narrow(self, projection: Projection) -> bool:
        return (
            projection.hidden.dtype == projection.weight.dtype == torch.bfloat16
            and projection.hidden.shape[1] % 2 == 0
            and extension.cpu_multiplies_bfloat16()
        )

    def block_rows(self, num_columns: int, device: torch.device) -> None:
        return None

    def gradient_dtype(self, projection: Projection) -> torch.dtype:
        return projection.dtype

    def logits(self, projection: Projection, rows: slice, out: torch.Tensor) -> None:
        extension.operations().linear_logits(
            row_major(projection.hidden[rows]),
            row_major(projection.weight),
            _bias(projection),
            projection.transform.product_scale,
            out,
        )

    def hidden_gradient(self, projection: Projection, gradient: torch.Tensor, out: torch.Tensor) -> None:
        extension.operations().linear_backward(
            gradient, row_major(projection.weight), projection.transform.gradient_scale, out
        )

    def add_weight_gradient(
        self, projection: Projection, gradient: torch.Tensor, rows: slice, out: torch.Tensor, first: bool
    ) -> None:
        hidden = row_major(projection.hidden[rows])
        extension.operations().linear_weight_gradient(
            gradient, hidden, projection.transform.gradient_scale, not first, out
        )

    def score(
        self, projection: Projection, rows: slice, target_ids: torch.Tensor, running: RunningScores, tile_bytes: int
    ) -> None:
        transform = projection.transform
        extension.operations().linear_score(
            row_major(projection.hidden[rows]),
            row_major(projection.weight),
            _bias(projection),
            transform.product_scale,
            transform.tanh_scale,
            target_ids.contiguous(),
            running.logsumexp,
            running.target_logits,
            running.entropy,
        )

    def scale_rows(self, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(rows.shape, dtype=dtype)
        extension.operations().scale_rows(rows, scale.to(torch.float32).contiguous(), out)
        return out

    def divergence(
        self,
        student: Projection,
        teacher: Projection,
        beta: float,
        workspace_bytes: int,
        needs_grad: NeedsGrad,
        unit_weights: bool,
    ) -> LogitDivergence:
        return LogitDivergence(self, student, teacher, beta, workspace_bytes, needs_grad, unit_weights)

    def softmax(
        self, logits: torch.Tensor, gradient: torch.Tensor, transform: LogitTransform, target_ids: torch.Tensor
    ) -> SoftmaxRows:
        result = SoftmaxRows(logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0]))
        extension.operations().tile_softmax_(logits, transform.tanh_scale, target_ids.contiguous(), *result)
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
        extension.operations().tile_logprob_gradient_(
            logits,
            transform.tanh_scale,
            scores.logsumexp.contiguous(),
            target_ids.contiguous(),
            contiguous(grads.logprobs),
            contiguous(grads.logsumexp),
            contiguous(scores.entropy),
            contiguous(grads.entropy),
        )

    def divergence_of_logits(
        self,
        logits: LogitPair,
        student: LogitTransform,
        teacher: LogitTransform,
        target_ids: torch.Tensor | None,
        beta: float,
        want_entropy: bool,
        with_gradient: bool,
    ) -> tuple[DivergenceRows, SavedDivergence]:
        statistics = logits.student.new_empty(_NUM_STATISTICS, logits.student.shape[0])
        extension.operations().tile_divergence_(
            logits.student,
            logits.teacher,
            student.tanh_scale,
            teacher.tanh_scale,
            logits.teacher_is_delta,
            contiguous(target_ids),
            beta,
            want_entropy,
            statistics,
            with_gradient,
        )
        with_targets, with_entropy = target_ids is not None, want_entropy
        rows = DivergenceRows(
            statistics[_DIVERGENCE],
            statistics[_STUDENT_LOGPROB] if with_targets else None,
            statistics[_TEACHER_LOGPROB] if with_targets else None,
            statistics[_STUDENT_ENTROPY] if with_entropy else None,
            statistics[_TEACHER_ENTROPY] if with_entropy else None,
        )
        return rows, SavedDivergence(logits, student.tanh_scale, beta, statistics)

    def divergence_of_logits_backward(
        self,
        saved: SavedDivergence,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        extension.operations().tile_divergence_gradient_(
            saved.logits.student,
            saved.logits.teacher,
            saved.tanh_scale,
            saved.logits.teacher_is_delta,
            contiguous(target_ids),
            saved.beta,
            saved.statistics,
            contiguous(weight),
            contiguous(logprob_weight),
        )

    def divergence_of_shard(
        self,
        logits: LogitPair,
        student: LogitTransform,
        teacher: LogitTransform,
        target_ids: torch.Tensor | None,
        beta: float,
        want_entropy: bool,
    ) -> tuple[ShardRows, SavedDivergence]:
        mixture = 0.0 < beta < 1.0
        ids = None if target_ids is None else target_ids.clamp(min=0)
        own_beta = 0.0 if mixture else beta
        rows, saved = self.divergence_of_logits(logits, student, teacher, ids, own_beta, want_entropy, False)
        wide = saved.statistics.double()
        student_logsumexp = wide[_STUDENT_MAX] + wide[_STUDENT_LOG_SUM]
        teacher_logsumexp = wide[_TEACHER_MAX] + wide[_TEACHER_LOG_SUM]
        if logits.teacher_is_delta is not None:
            # A row of differences: relative to the student's maximum, and by the log-ratio where that has more digits.
            near = wide[_LOG_RATIO].isfinite()
            of_delta = torch.where(near, student_logsumexp + wide[_LOG_RATIO], wide[_STUDENT_MAX] + teacher_logsumexp)
            teacher_logsumexp = torch.where(logits.teacher_is_delta, of_delta, teacher_logsumexp)
        part = ShardRows(student_logsumexp, teacher_logsumexp, None if mixture else rows.divergence, *rows[1:])
        return part, saved._replace(beta=beta)

    def mixture_of_shard(self, saved: SavedDivergence, whole: WholeRows) -> torch.Tensor:
        _take_whole(saved, whole)
        logits = saved.logits
        extension.operations().tile_divergence_(
            logits.student,
            logits.teacher,
            None,
            None,
            logits.teacher_is_delta,
            None,
            saved.beta,
            False,
            saved.statistics,
            False,
            True,
        )
        return saved.statistics[[_DIVERGENCE, _STUDENT_TO_MIXTURE]]

    def divergence_of_shard_backward(
        self,
        saved: SavedDivergence,
        whole: WholeRows,
        target_ids: torch.Tensor | None,
        weight: torch.Tensor | None,
        logprob_weight: torch.Tensor | None,
    ) -> None:
        _take_whole(saved, whole)
        self.divergence_of_logits_backward(saved, target_ids, weight, logprob_weight)


def _take_whole(saved: SavedDivergence, whole: WholeRows) -> None:
    """Put the statistics of the whole vocabulary in the place of those of a slice of it."""
    statistics = saved.statistics

    def split(logsumexp: torch.Tensor, high: int, low: int) -> None:
        statistics[high] = logsumexp
        statistics[low] = logsumexp - statistics[high]

    student, teacher = whole.student_logsumexp, whole.teacher_logsumexp
    split(student, _STUDENT_MAX, _STUDENT_LOG_SUM)
    if saved.logits.teacher_is_delta is not None:
        # Where the slice's differences are near, r is delta less the log-ratio of the whole rows.
        near = saved.logits.teacher_is_delta & statistics[_LOG_RATIO].isfinite()
        statistics[_LOG_RATIO] = torch.where(near, (teacher - student).to(statistics.dtype), torch.inf)
        teacher = torch.where(saved.logits.teacher_is_delta, teacher - statistics[_STUDENT_MAX], teacher)
    split(teacher, _TEACHER_MAX, _TEACHER_LOG_SUM)
    statistics[_DIVERGENCE] = whole.rows.divergence
    if whole.student_kl is not None:
        statistics[_STUDENT_TO_MIXTURE] = whole.student_kl
    statistics[:, (student + teacher).isnan()] = torch.nan


def _bias(projection: Projection) -> torch.Tensor | None:
    return None if projection.bias is None else projection.bias.to(torch.float32).contiguous()
