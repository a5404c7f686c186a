"""`linear_divergence`: per-token divergence of two models from their hidden states, without the logits."""

from __future__ import annotations

from typing import Any

import torch

from unisd_kernels import reference
from unisd_kernels.autocast import autocast_operands
from unisd_kernels.backends.base import DivergenceRows, NeedsGrad
from unisd_kernels.backends.engine import Engine
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.registry import resolve
from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.config import check_number
from unisd_kernels.heads import LMHead
from unisd_kernels.heads.shard import VocabShard
from unisd_kernels.ops.autograd import first_order_only, recordable, recordable_head, save, saved
from unisd_kernels.validation import (
    check_heads_match,
    check_hidden,
    check_same_precision,
    check_same_rows,
    check_workspace,
)


def linear_divergence(
    student_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    impl: str | None = None,
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Divergence between teacher and student at each row, differentiable with any upstream weights.

        beta = 0      D = KL(p_t || p_s)                                forward KL
        beta = 1      D = KL(p_s || p_t)                                reverse KL
        0 < beta < 1  D = beta KL(p_t || m) + (1 - beta) KL(p_s || m),  m = (1 - beta) p_s + beta p_t

    with p = softmax(softcap_c(a (h W^T + b)) / tau) of each model's own head. No gradient reaches the teacher.

    With a frozen student head token n's gradient reaches only row n of `student_hidden`, so the forward computes
    the rows dD_n/dh_n while the logits exist (3 matrix products in all) and the backward multiplies them by the
    upstream vector: weights, masks, clipping and any normalization applied to the result are exact. With a trainable
    head those weights must be known before they are summed over tokens, so the backward recomputes the logits
    (2 + 4 products); `unisd_loss`, which knows its weights, needs 4.

    Args:
        student_hidden: [N, H_s]. May require a gradient.
        student_head: see `LMHead`; weight and bias get a gradient if they require one.
        teacher_hidden: [N, H_t]; its own width, scale and cap are fine, only the number of columns must agree.
        teacher_head: the teacher's head.
        beta: in [0, 1].
        temperature: tau > 0, of both distributions.
        impl: implementation by name; None chooses.
        workspace_bytes: bound on the logits held at a time; None for the default.

    Returns:
        [N] float32 (float64 for float64 inputs), nats, >= 0; NaN where a logit of the row is NaN or infinite (also
        minus infinity, and whatever a cap would make of it).

    Saved for backward: frozen head: [N, H_s] in float32. Trainable head: the inputs. Tensors made under
    `torch.inference_mode()` are as good as others. Double backward raises.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit, saying what was got.

    Source: docs/design.md; `beta` as in GKD, arXiv 2306.13649.
    """
    check_hidden("student_hidden", student_hidden, student_head, "student_head")
    check_hidden("teacher_hidden", teacher_hidden, teacher_head, "teacher_head")
    check_same_rows("teacher_hidden", teacher_hidden, student_hidden.shape[0])
    check_same_precision("teacher_hidden", teacher_hidden, student_hidden)
    if teacher_hidden.device != student_hidden.device:
        raise ValueError(
            f"teacher_hidden is on {teacher_hidden.device} but student_hidden is on {student_hidden.device}; move one "
            "of them"
        )
    check_heads_match(student_head, teacher_head)
    check_number("beta", beta, low=0.0, high=1.0)
    check_number("temperature", temperature, low=0.0, open_low=True)
    check_workspace(workspace_bytes)
    implementation = resolve(impl, student_hidden.device, student_hidden.dtype)
    wide_head = student_head
    student_hidden, student_head = autocast_operands(student_hidden, student_head)
    teacher_hidden, teacher_head = autocast_operands(teacher_hidden, teacher_head, (wide_head, student_head))
    if implementation.backend is None:
        with torch.autocast(student_hidden.device.type, enabled=False):
            return reference.linear_divergence(
                recordable(student_hidden),
                recordable_head(student_head),
                recordable(teacher_hidden),
                recordable_head(teacher_head),
                beta,
                temperature,
            )
    needs_grad = NeedsGrad.of(student_hidden, student_head.active_weight, student_head.active_bias)
    return _LinearDivergence.apply(
        student_hidden,
        student_head.active_weight,
        student_head.active_bias,
        (LogitTransform.of(student_head, temperature), student_head.shard),
        Projection.of(teacher_hidden, teacher_head, temperature),
        float(beta),
        needs_grad,
        Engine.of(implementation.backend(), workspace_bytes, student_hidden.device, needs_grad.weight),
    )


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        form: tuple[LogitTransform, VocabShard | None],
        teacher: Projection,
        beta: float,
        needs_grad: NeedsGrad,
        engine: Engine,
    ) -> torch.Tensor:
        student = Projection(hidden, weight, bias, *form).detach()
        ctx.frozen_head = not needs_grad.head
        ctx.hidden_dtype = hidden.dtype
        if ctx.frozen_head:
            rows, gradients = engine.divergence(student, teacher, None, beta, needs_grad)
            ctx.backend = engine.backend
            ctx.save_for_backward(gradients.hidden)
        else:
            rows, _ = engine.divergence(student, teacher, None, beta)
            ctx.settings = (form, (teacher.transform, teacher.shard), beta, engine)
            save(ctx, hidden, weight, bias, teacher.hidden, teacher.weight, teacher.bias)
        return rows.divergence

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.frozen_head:
            (row_gradients,) = ctx.saved_tensors
            return (ctx.backend.scale_rows(row_gradients, upstream, ctx.hidden_dtype), *(None,) * 7)
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = saved(ctx)
        form, teacher_form, beta, engine = ctx.settings

        def row_weights(rows: slice, statistics: DivergenceRows) -> tuple[torch.Tensor, None]:
            return upstream[rows], None

        _, gradients = engine.divergence(
            Projection(hidden, weight, bias, *form),
            Projection(teacher_hidden, teacher_weight, teacher_bias, *teacher_form),
            None,
            beta,
            NeedsGrad(*ctx.needs_input_grad[:3]),
            row_weights,
        )
        return (*gradients.scaled(None, hidden.dtype, weight.dtype), *(None,) * 5)
