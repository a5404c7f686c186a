"""The memory-bounded form of the UniSD loss: gradients are made in the forward, while the logits exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unisd_kernels.backends.base import DivergenceRows, NeedsGrad
from unisd_kernels.backends.engine import Engine, Gradients, allocate
from unisd_kernels.backends.projection import Projection
from unisd_kernels.batch import Batch
from unisd_kernels.certified.views import views_agreement
from unisd_kernels.config import LossConfig, LossInputs
from unisd_kernels.dtypes import statistics_dtype
from unisd_kernels.ops.agreement import weights_in_batch
from unisd_kernels.ops.autograd import first_order_only
from unisd_kernels.ops.quantile import clip_cap
from unisd_kernels.packing import sequence_ids, sequence_sums
from unisd_kernels.results import UniSDLoss

# Feature matching widens this many bytes of hidden states at a time.
_FEATURE_CHUNK_BYTES = 16 << 20
# Up to this many rows of all auxiliary views are scored as one, so that the weight is read once for all of them. With
# more of them a product covers the reading, and stacking would only cost the memory of a copy.
_STACKED_ROWS = 2048


@dataclass(frozen=True)
class _Plan:
    """Everything that the walk over the logits needs besides the student."""

    teacher: Projection
    target_ids: torch.Tensor  # [N]
    negative_logprobs: torch.Tensor | None  # [N]
    divergence_scale: torch.Tensor  # [N]: dL / d min(D_n, cap) before divergence_weight
    mean_scale: torch.Tensor  # [N]: dL / dC_n and dL / dF_n before their weights
    config: LossConfig
    needs_grad: NeedsGrad
    engine: Engine
    batch: Batch


class LossFunction(torch.autograd.Function):
    """`unisd_loss` of checked inputs; differentiable in the student's hidden states, weight and bias, which come first
    because autograd looks at no tensor inside a value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: LossInputs,
        config: LossConfig,
        needs_grad: NeedsGrad,
        engine: Engine,
        batch: Batch,
    ) -> tuple[torch.Tensor | None, ...]:
        result, gradients, grad_scale = loss_and_gradients(inputs, config, needs_grad, engine, batch)
        ctx.mark_non_differentiable(*(value for value in result[1:] if value is not None))
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.backend = (hidden.dtype, weight.dtype), engine.backend
        ctx.save_for_backward(*gradients, grad_scale)
        return tuple(result)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        *gradients, grad_scale = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        # A graph that is kept may ask for the same again.
        last = not torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = Gradients(*gradients).scaled(upstream * grad_scale, hidden_dtype, weight_dtype, ctx.backend, last)
        return (*scaled, *(None,) * 5)


def loss_and_gradients(
    inputs: LossInputs, config: LossConfig, needs_grad: NeedsGrad, engine: Engine, batch: Batch | None = None
) -> tuple[UniSDLoss, Gradients, torch.Tensor]:
    """The loss with its statistics, and its gradients in units of a 0-dim scale (`_grad_scale`), which comes third.

    To be called where autograd does not record. `batch` is what the rows are of; None for these rows.
    """
    batch = Batch.of(inputs.cu_seqlens, inputs.num_rows) if batch is None else batch
    target_ids = inputs.target_ids.long()
    student_head, teacher_head, auxiliary_head, negative_head = inputs.heads

    has_divergence, has_contrast = config.runs_divergence, config.runs_contrast(inputs.negative_hidden is not None)
    # All views that only are scored, at once: ranks with slices of the heads then exchange their statistics at once.
    views: list[tuple[Projection, torch.Tensor]] = []
    if has_contrast:
        assert inputs.negative_hidden is not None
        views.append((Projection.of(inputs.negative_hidden, negative_head, config.temperature), target_ids))
    scores_views = bool(inputs.auxiliary_hidden) and has_divergence
    if scores_views and config.views_dtype is None:
        hidden = inputs.auxiliary_hidden
        stacked = engine.backend.stacks_views and len(hidden) * inputs.num_rows <= _STACKED_ROWS
        hidden = (torch.cat(hidden),) if stacked else hidden
        ids = target_ids.repeat(len(inputs.auxiliary_hidden)) if stacked else target_ids
        views += [(Projection.of(each, auxiliary_head, 1.0), ids) for each in hidden]
    scored = [scores.logprobs for scores in engine.score_views(views)]
    negative = scored.pop(0) if has_contrast else None
    dtype = statistics_dtype(inputs.student_hidden.dtype)
    weights = torch.ones(inputs.num_rows, dtype=dtype, device=inputs.student_hidden.device)
    auxiliary = spread = None
    if scores_views and config.views_dtype is not None:
        auxiliary, weights, spread, _ = views_agreement(inputs, config, engine)
    elif scored:
        auxiliary = torch.cat(scored).view(len(inputs.auxiliary_hidden), inputs.num_rows)
        weights, spread = weights_in_batch(
            auxiliary,
            inputs.cu_seqlens,
            batch,
            config.agreement,
            config.agreement_statistic,
            config.agreement_gamma,
        )
    if inputs.token_weights is not None:
        weights = weights * inputs.token_weights.to(dtype)

    divergence_scale, mean_scale = _row_scales(inputs, config, weights, batch)
    student = Projection.of(inputs.student_hidden, student_head, config.temperature)
    plan = _Plan(
        Projection.of(inputs.teacher_hidden, teacher_head, config.temperature),
        target_ids,
        negative,
        divergence_scale,
        mean_scale,
        config,
        needs_grad,
        engine,
        batch,
    )
    rows: DivergenceRows | None
    if has_divergence or has_contrast:
        rows, gradients, grad_scale, clipped, contrastive = _divergence_and_contrastive(student, plan)
    else:
        # Feature matching alone: no logit is needed.
        rows, clipped, contrastive = None, None, None
        gradients = allocate(needs_grad, student, written=False)
        grad_scale = torch.ones((), dtype=student.dtype, device=student.hidden.device)

    features = None
    if config.feature_weight > 0:
        features = _feature_matching(student, plan, gradients.hidden, grad_scale)
    zero = torch.zeros((), dtype=student.dtype, device=student.hidden.device)
    divergence = was_clipped = None
    divergence_loss = zero.clone()
    if has_divergence:
        assert rows is not None
        divergence = kept = rows.divergence
        was_clipped = torch.zeros_like(divergence, dtype=torch.bool)
        if clipped is not None:
            kept, was_clipped = torch.where(clipped.mask, clipped.cap, kept), clipped.mask
        divergence_loss = (divergence_scale * kept).sum()
    contrastive_loss = zero if contrastive is None else (mean_scale * contrastive).sum()
    feature_loss = zero.clone() if features is None else (mean_scale * features).sum()
    loss = (
        config.divergence_weight * divergence_loss
        + config.contrastive_weight * contrastive_loss
        + config.feature_weight * feature_loss
    )
    result = UniSDLoss(
        loss=loss,
        divergence_loss=divergence_loss,
        contrastive_loss=contrastive_loss,
        feature_loss=feature_loss,
        divergence=divergence,
        clipped=was_clipped,
        weights=weights if has_divergence else None,
        student_logprobs=None if rows is None else rows.student_logprobs,
        teacher_logprobs=None if rows is None else rows.teacher_logprobs,
        student_entropy=None if rows is None else rows.student_entropy,
        teacher_entropy=None if rows is None else rows.teacher_entropy,
        negative_logprobs=negative,
        contrastive=contrastive,
        feature_distance=features,
        auxiliary_logprobs=auxiliary,
        disagreement=spread,
    )
    return result, gradients, grad_scale


def _row_scales(
    inputs: LossInputs, config: LossConfig, weights: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reduction as row weights: L = sum_n divergence_scale_n D_n + mean_scale_n (...), both [N]."""
    weighted = config.resolved_weight_normalization(bool(inputs.auxiliary_hidden)) == "weighted"
    if config.normalization == "sequence":
        ids = sequence_ids(inputs.cu_seqlens, inputs.num_rows)
        lengths = batch.lengths.to(weights.dtype)
        totals = batch.over_sequences(sequence_sums(weights, inputs.cu_seqlens)) if weighted else lengths
        groups = max(batch.num_sequences, 1)
        divergence_scale = weights / (totals.clamp(min=1.0)[ids] * groups)
        mean_scale = 1.0 / (lengths.clamp(min=1.0)[ids] * groups)
    else:
        num_rows = max(batch.num_rows, 1)
        mean_scale = torch.full_like(weights, 1.0 / num_rows)
        if weighted and inputs.weight_total is not None:
            return weights / inputs.weight_total, mean_scale * inputs.share(config.normalization, weights.dtype, batch)
        total = batch.total(weights).clamp(min=1.0) if weighted else num_rows
        divergence_scale = weights / total
    share = inputs.share(config.normalization, weights.dtype, batch)
    return divergence_scale * share, mean_scale * share


@dataclass(frozen=True)
class _Clipped:
    cap: torch.Tensor
    mask: torch.Tensor  # [N] bool


def _divergence_and_contrastive(
    student: Projection, plan: _Plan
) -> tuple[DivergenceRows, Gradients, torch.Tensor, _Clipped | None, torch.Tensor | None]:
    """Statistics, gradients in units of `grad_scale`, the clipped rows, and C [N]."""
    config, needs_grad, negative = plan.config, plan.needs_grad, plan.negative_logprobs
    divergence_coefficient = plan.divergence_scale * config.divergence_weight
    contrastive_coefficient = plan.mean_scale * config.contrastive_weight
    grad_scale = _grad_scale(plan, divergence_coefficient, contrastive_coefficient)

    cap = None
    if config.clip_cap is not None:
        cap = torch.full((), config.clip_cap, dtype=student.dtype, device=grad_scale.device)
    # With a frozen head and no other term in the logits' gradient, weights and clip mask may wait until the rows of
    # dD/dh exist; it saves a pass over the logits, and for a quantile cap a whole walk.
    deferred = needs_grad.hidden and not needs_grad.head and negative is None
    weighs = config.divergence_weight > 0
    if config.clip_quantile is not None and weighs and not deferred and needs_grad.any and plan.batch.num_rows:
        first, _ = plan.engine.divergence(student, plan.teacher, None, config.beta)
        cap = clip_cap(plan.batch.gathered(first.divergence), config.clip_quantile)

    def row_weights(rows: slice, statistics: DivergenceRows) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if deferred:
            return None, None
        weight = divergence_coefficient[rows] / grad_scale
        if cap is not None:
            weight = weight.masked_fill(statistics.divergence > cap, 0.0)
        if negative is None:
            return weight, None
        value, sign = _hinge(statistics, negative[rows], config.contrastive_margin)
        return weight, (contrastive_coefficient[rows] / grad_scale) * (value > 0) * sign

    # Feature matching alone: the logits serve statistics only.
    in_logits = config.divergence_weight > 0 or (negative is not None and config.contrastive_weight > 0)
    rows, gradients = plan.engine.divergence(
        student,
        plan.teacher,
        plan.target_ids,
        config.beta,
        needs_grad if in_logits else NeedsGrad(),
        row_weights,
        config.return_entropy,
    )
    if not in_logits:
        gradients = allocate(needs_grad, student, written=False)
    if config.clip_quantile is not None and cap is None and plan.batch.num_rows:
        cap = clip_cap(plan.batch.gathered(rows.divergence), config.clip_quantile)
    clipped = None if cap is None else _Clipped(cap, rows.divergence > cap)
    if deferred:
        weight = divergence_coefficient / grad_scale
        if clipped is not None:
            weight = weight.masked_fill(clipped.mask, 0.0)
        assert gradients.hidden is not None
        gradients.hidden.mul_(weight.unsqueeze(-1))
    contrastive = None
    if negative is not None:
        contrastive = _hinge(rows, negative, config.contrastive_margin)[0]
    return rows, gradients, grad_scale, clipped, contrastive


def _grad_scale(
    plan: _Plan, divergence_coefficient: torch.Tensor, contrastive_coefficient: torch.Tensor
) -> torch.Tensor:
    """The largest row coefficient: gradients are formed relative to it and scaled at the end, so that 1 / (number of
    tokens) does not push a float16 gradient tile into its subnormals. 0-dim, stays on the device."""
    largest = torch.ones((), dtype=plan.divergence_scale.dtype, device=plan.divergence_scale.device)
    if plan.divergence_scale.numel():
        largest = torch.maximum(divergence_coefficient.abs().amax(), contrastive_coefficient.abs().amax())
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _hinge(statistics: DivergenceRows, negative: torch.Tensor, margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """C and the derivative of its argument with respect to the student's log-probability."""
    assert statistics.student_logprobs is not None
    assert statistics.teacher_logprobs is not None
    to_teacher = statistics.student_logprobs - statistics.teacher_logprobs
    to_negative = statistics.student_logprobs - negative
    value = torch.relu(margin + to_teacher.abs() - to_negative.abs())
    return value, to_teacher.sign() - to_negative.sign()


def _feature_matching(
    student: Projection, plan: _Plan, gradient: torch.Tensor | None, grad_scale: torch.Tensor
) -> torch.Tensor:
    """F [N]; adds its gradient, in units of `grad_scale`, to `gradient`."""
    num_rows, width = student.hidden.shape
    distance = torch.zeros(num_rows, dtype=student.dtype, device=student.hidden.device)
    coefficient = plan.mean_scale * (plan.config.feature_weight * 2.0 / width) / grad_scale
    step = max(1, _FEATURE_CHUNK_BYTES // (student.dtype.itemsize * width))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        difference = student.hidden[rows].to(student.dtype) - plan.teacher.hidden[rows].to(student.dtype)
        distance[rows] = torch.linalg.vecdot(difference, difference) / width
        if gradient is not None:
            gradient[rows].addcmul_(difference, coefficient[rows].unsqueeze(-1))
    return distance
