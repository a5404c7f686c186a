"""The loss as one opaque operator, for `torch.compile`: the compiler need not see the walk over chunks of logits, whose
number depends on the batch, and the graph of the caller does not break.

Eager calls do not come here. The operator computes loss and gradients as they do (`loss_autograd.loss_and_gradients`);
arguments are checked when it runs.
"""

from __future__ import annotations

from typing import Any

import torch

from unisd_kernels.backends import engine
from unisd_kernels.backends.base import NeedsGrad
from unisd_kernels.backends.registry import resolve
from unisd_kernels.config import LossConfig, LossInputs, check_number
from unisd_kernels.heads import LMHead
from unisd_kernels.ops.autograd import first_order_only
from unisd_kernels.ops.loss_autograd import loss_and_gradients
from unisd_kernels.reference.logprobs import statistics_dtype
from unisd_kernels.results import UniSDLoss
from unisd_kernels.validation import check_loss_inputs

_SCALARS = 4  # loss and its three parts lead the fields of UniSDLoss


def compiled_unisd_loss(inputs: LossInputs, config: LossConfig, impl: str | None, workspace: int) -> UniSDLoss:
    """`unisd_loss` inside a graph."""
    # What the operator cannot see: it gets a float, and tensors without autograd. The rest is checked when it runs.
    for name in ("token_weights", "num_items"):
        value = getattr(inputs, name)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient; detach it")
    if inputs.num_items is not None and not isinstance(inputs.num_items, torch.Tensor):
        check_number("num_items", inputs.num_items, low=0.0)
    student, teacher = inputs.student_head, inputs.teacher_head
    auxiliary = teacher if inputs.auxiliary_head is None else inputs.auxiliary_head
    negative = teacher if inputs.negative_head is None else inputs.negative_head
    needs_grad = engine.needs_grad_of(inputs.student_hidden, student.active_weight, student.active_bias)
    num_items = inputs.num_items
    heads = (student, teacher, auxiliary, negative)
    flat = _loss_operator(
        inputs.student_hidden,
        student.active_weight,
        student.active_bias,
        inputs.teacher_hidden,
        [head.active_weight.detach() for head in heads[1:]],
        # No bias is an empty one here: a list has no place for None.
        [head.weight.new_empty(0) if head.active_bias is None else head.active_bias.detach() for head in heads[1:]],
        list(inputs.auxiliary_hidden),
        inputs.negative_hidden,
        inputs.target_ids,
        inputs.cu_seqlens,
        inputs.token_weights,
        num_items if isinstance(num_items, torch.Tensor) else None,
        None if num_items is None or isinstance(num_items, torch.Tensor) else float(num_items),
        [float(head.logit_scale) for head in heads],
        # Nor for no cap.
        [float(head.softcap or 0.0) for head in heads],
        float(config.beta),
        float(config.temperature),
        config.clip_cap,
        config.clip_quantile,
        config.agreement,
        config.agreement_statistic,
        float(config.agreement_gamma),
        config.weight_normalization,
        float(config.contrastive_weight),
        float(config.contrastive_margin),
        float(config.feature_weight),
        float(config.divergence_weight),
        config.normalization,
        config.return_entropy,
        config.return_statistics,
        [needs_grad.hidden, needs_grad.weight, needs_grad.bias],
        impl,
        workspace,
    )
    present = _present(len(inputs.auxiliary_hidden), inputs.negative_hidden is not None, config)
    loss, *statistics = (value if there else None for value, there in zip(flat, present))
    return UniSDLoss(loss, *(None if value is None else value.detach() for value in statistics))  # type: ignore[arg-type]


@torch.library.custom_op("unisd::loss", mutates_args=())
def _loss_operator(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    other_weights: list[torch.Tensor],
    other_biases: list[torch.Tensor],
    auxiliary_hidden: list[torch.Tensor],
    negative_hidden: torch.Tensor | None,
    target_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_weights: torch.Tensor | None,
    num_items_tensor: torch.Tensor | None,
    num_items: float | None,
    logit_scales: list[float],
    softcaps: list[float],
    beta: float,
    temperature: float,
    clip_cap: float | None,
    clip_quantile: float | None,
    agreement: str,
    agreement_statistic: str,
    agreement_gamma: float,
    weight_normalization: str | None,
    contrastive_weight: float,
    contrastive_margin: float,
    feature_weight: float,
    divergence_weight: float,
    normalization: str,
    return_entropy: bool,
    return_statistics: bool,
    needs_grad: list[bool],
    impl: str | None,
    workspace: int,
) -> list[torch.Tensor]:
    """The 16 fields of UniSDLoss, then the gradients of hidden states, weight and bias, and their scale; what is absent
    is an empty tensor."""
    student, teacher, auxiliary, negative = (
        LMHead(weight, bias, scale, cap or None)
        for weight, bias, scale, cap in zip(
            [student_weight, *other_weights],
            [student_bias, *(bias if bias.numel() else None for bias in other_biases)],
            logit_scales,
            softcaps,
            strict=True,
        )
    )
    inputs = LossInputs(
        student_hidden,
        student,
        teacher_hidden,
        teacher,
        target_ids,
        cu_seqlens,
        tuple(auxiliary_hidden),
        auxiliary,
        negative_hidden,
        negative,
        token_weights,
        num_items if num_items_tensor is None else num_items_tensor,
    )
    config = LossConfig(
        beta=beta,
        temperature=temperature,
        clip_cap=clip_cap,
        clip_quantile=clip_quantile,
        agreement=agreement,  # type: ignore[arg-type]
        agreement_statistic=agreement_statistic,  # type: ignore[arg-type]
        agreement_gamma=agreement_gamma,
        weight_normalization=weight_normalization,  # type: ignore[arg-type]
        contrastive_weight=contrastive_weight,
        contrastive_margin=contrastive_margin,
        feature_weight=feature_weight,
        divergence_weight=divergence_weight,
        normalization=normalization,  # type: ignore[arg-type]
        return_entropy=return_entropy,
        return_statistics=return_statistics,
    )
    check_loss_inputs(inputs, config)
    implementation = resolve(impl, student_hidden.device, student_hidden.dtype)
    assert implementation.backend is not None
    backend = implementation.backend()
    result, gradients, grad_scale = loss_and_gradients(inputs, config, NeedsGrad(*needs_grad), backend, workspace)
    # An operator's results own their memory: statistics may be rows of one tensor, gradients are not.
    fields = [grad_scale.new_empty(0) if value is None else value.clone() for value in result]
    return [*fields, *(grad_scale.new_empty(0) if value is None else value for value in gradients), grad_scale]


@_loss_operator.register_fake
def _(  # type: ignore[no-untyped-def]
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    other_weights,
    other_biases,
    auxiliary_hidden,
    negative_hidden,
    target_ids,
    cu_seqlens,
    *rest,
):
    agreement, needs_grad = rest[9], rest[20]
    num_rows = student_hidden.shape[0]
    dtype = statistics_dtype(student_hidden.dtype)

    def new(*shape, dtype=dtype):  # type: ignore[no-untyped-def]
        return student_hidden.new_empty(shape, dtype=dtype)

    config = LossConfig(
        contrastive_weight=rest[13],
        feature_weight=rest[15],
        divergence_weight=rest[16],
        return_entropy=rest[18],
        return_statistics=rest[19],
    )
    present = _present(len(auxiliary_hidden), negative_hidden is not None, config)
    shapes: list[tuple[int, ...]] = [()] * _SCALARS + [(num_rows,)] * 10
    shapes.append((len(auxiliary_hidden), num_rows))
    shapes.append((num_rows if agreement == "token" else cu_seqlens.shape[0] - 1,))
    fields = [
        new(*(shape if there else (0,)), dtype=torch.bool if there and name == "clipped" else dtype)
        for name, shape, there in zip(UniSDLoss._fields, shapes, present, strict=True)
    ]
    gradients = [
        new(*like.shape) if is_wanted else new(0)
        for like, is_wanted in zip((student_hidden, student_weight, student_bias), needs_grad, strict=True)
    ]
    return [*fields, *gradients, new()]


def _present(num_auxiliary: int, has_negative: bool, config: LossConfig) -> list[bool]:
    """Which fields of UniSDLoss are not None."""
    divergence, contrast = config.runs_divergence, config.runs_contrast(has_negative)
    optional = {
        **dict.fromkeys(("divergence", "clipped", "weights"), divergence),
        **dict.fromkeys(("student_logprobs", "teacher_logprobs"), divergence or contrast),
        **dict.fromkeys(("student_entropy", "teacher_entropy"), config.return_entropy and (divergence or contrast)),
        **dict.fromkeys(("negative_logprobs", "contrastive"), contrast),
        "feature_distance": config.feature_weight > 0,
        **dict.fromkeys(("auxiliary_logprobs", "disagreement"), divergence and num_auxiliary > 0),
    }
    return [optional.get(name, True) for name in UniSDLoss._fields]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.num_inputs = len(inputs)
    ctx.num_others = len(inputs[4])
    ctx.num_auxiliary = len(inputs[6])
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)
    ctx.needs_grad = inputs[30]
    ctx.save_for_backward(*output[len(UniSDLoss._fields) :])


@first_order_only
def _backward(ctx: Any, upstream: list[torch.Tensor]) -> tuple[object, ...]:
    *gradients, grad_scale = ctx.saved_tensors
    kept = engine.Gradients(*(value if there else None for value, there in zip(gradients, ctx.needs_grad, strict=True)))
    found = kept.scaled(upstream[0] * grad_scale, *ctx.dtypes)
    rest: list[list[None] | None] = [None] * (ctx.num_inputs - 3)
    # Lists of tensors take lists of gradients.
    rest[1], rest[2], rest[3] = [None] * ctx.num_others, [None] * ctx.num_others, [None] * ctx.num_auxiliary
    return (*found, *rest)


_loss_operator.register_autograd(_backward, setup_context=_setup_context)
