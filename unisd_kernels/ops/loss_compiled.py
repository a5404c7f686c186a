"""The loss as one opaque operator, for `torch.compile`.

The compiler need not see the walk over chunks of logits, whose number depends on the batch, and the graph of the caller
does not break.

Eager calls do not come here. The operator computes loss and gradients as they do (`loss_autograd.loss_and_gradients`);
arguments are checked when it runs. An operator's schema holds tensors and numbers only: the tensors travel as a list
with a mask of which are there, the settings as `LossConfig.encode` gives them.
"""

from __future__ import annotations

from typing import Any

import torch

from unisd_kernels.backends.base import NeedsGrad
from unisd_kernels.backends.engine import Engine, Gradients
from unisd_kernels.backends.registry import resolve
from unisd_kernels.certified.views import check_frozen, check_views
from unisd_kernels.config import LossConfig, LossInputs, check_number
from unisd_kernels.dtypes import statistics_dtype
from unisd_kernels.heads import LMHead
from unisd_kernels.ops.autograd import first_order_only
from unisd_kernels.ops.loss_autograd import loss_and_gradients
from unisd_kernels.results import UniSDLoss
from unisd_kernels.validation import check_loss_inputs

_SCALARS = 4  # loss and its three parts lead the fields of UniSDLoss
# Of the list of tensors: the student's three get gradients and come first, as many auxiliary views as there are last.
_DIFFERENTIABLE = 3
_HEADS = ("student", "teacher", "auxiliary", "negative")
_SINGLE = ("student_hidden", "teacher_hidden", "negative_hidden", "target_ids", "cu_seqlens", "token_weights")
_SLOTS = (
    "student_hidden",
    *(f"{head}_head.{part}" for head in _HEADS for part in ("weight", "bias")),
    *_SINGLE[1:],
    "num_items",
    "weight_total",
)


def loss_compiled(inputs: LossInputs, config: LossConfig, impl: str | None, workspace_bytes: int | None) -> UniSDLoss:
    """`unisd_loss` inside a graph."""
    # The operator gets a float, and tensors without autograd, so it cannot see these. The rest is checked when it runs.
    for name in ("token_weights", "num_items", "weight_total"):
        value = getattr(inputs, name)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient; detach it")
    for name in ("num_items", "weight_total"):
        value = getattr(inputs, name)
        if value is not None and not isinstance(value, torch.Tensor):
            check_number(name, value, low=0.0)
    check_frozen(inputs, config)
    num_items = inputs.num_items
    student = inputs.student_head
    needs_grad = NeedsGrad.of(inputs.student_hidden, student.active_weight, student.active_bias)
    slots = _slots(inputs)
    tensors = [tensor for tensor in slots if tensor is not None]
    flat = _loss_operator(
        [*tensors, *inputs.auxiliary_hidden],
        [tensor is not None for tensor in slots],
        # No cap is a cap of 0 here.
        [constant for head in inputs.heads for constant in (float(head.logit_scale), float(head.softcap or 0.0))],
        None if num_items is None or isinstance(num_items, torch.Tensor) else float(num_items),
        config.encode(),
        [needs_grad.hidden, needs_grad.weight, needs_grad.bias],
        impl,
        workspace_bytes,
    )
    present = _present(len(inputs.auxiliary_hidden), inputs.negative_hidden is not None, config)
    loss, *statistics = (value if there else None for value, there in zip(flat, present))
    return UniSDLoss(loss, *(None if value is None else value.detach() for value in statistics))  # type: ignore[arg-type]


def _slots(inputs: LossInputs) -> list[torch.Tensor | None]:
    """The tensors of `_SLOTS`; an auxiliary or negative head is left out where it is the teacher's."""
    own = (inputs.student_head, inputs.teacher_head, inputs.auxiliary_head, inputs.negative_head)
    slots: dict[str, torch.Tensor | None] = {name: getattr(inputs, name) for name in _SINGLE}
    for name, head in zip(_HEADS, own, strict=True):
        weight = bias = None
        if head is not None:
            weight, bias = head.active_weight, head.active_bias
            if name != "student":
                weight, bias = weight.detach(), None if bias is None else bias.detach()
        slots[f"{name}_head.weight"], slots[f"{name}_head.bias"] = weight, bias
    slots["num_items"] = inputs.num_items if isinstance(inputs.num_items, torch.Tensor) else None
    total = inputs.weight_total
    slots["weight_total"] = torch.tensor(total, dtype=torch.float64) if isinstance(total, (int, float)) else total
    return [slots[name] for name in _SLOTS]


def _named(tensors: list[torch.Tensor], present: list[bool]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The tensors that are there by name, and the auxiliary views."""
    names = [name for name, there in zip(_SLOTS, present, strict=True) if there]
    return dict(zip(names, tensors)), tensors[len(names) :]


@torch.library.custom_op("unisd::loss", mutates_args=())
def _loss_operator(
    tensors: list[torch.Tensor],
    present: list[bool],
    head_constants: list[float],
    num_items: float | None,
    config: list[float],
    needs_grad: list[bool],
    impl: str | None,
    workspace_bytes: int | None,
) -> list[torch.Tensor]:
    """The 16 fields of UniSDLoss, then the gradients of hidden states, weight and bias, and their scale; what is absent
    is an empty tensor."""
    named, auxiliary_hidden = _named(tensors, present)
    heads = {
        f"{name}_head": LMHead(named[f"{name}_head.weight"], named.get(f"{name}_head.bias"), scale, cap or None)
        for name, scale, cap in zip(_HEADS, head_constants[::2], head_constants[1::2], strict=True)
        if f"{name}_head.weight" in named
    }
    inputs = LossInputs(
        **{name: named.get(name) for name in _SINGLE},  # type: ignore[arg-type]
        **heads,  # type: ignore[arg-type]
        auxiliary_hidden=tuple(auxiliary_hidden),
        num_items=named.get("num_items", num_items),
        weight_total=named.get("weight_total"),
    )
    settings = LossConfig.decode(config)
    check_loss_inputs(inputs, settings)
    device = inputs.student_hidden.device
    implementation = resolve(impl, device, inputs.student_hidden.dtype)
    check_views(inputs, settings, implementation.name)
    assert implementation.backend is not None
    needed = NeedsGrad(*needs_grad)
    engine = Engine.of(implementation.backend(), workspace_bytes, device, needed.weight)
    result, gradients, grad_scale = loss_and_gradients(inputs, settings, needed, engine)
    # An operator's results own their memory: statistics may be rows of one tensor, gradients are not.
    fields = [grad_scale.new_empty(0) if value is None else value.clone() for value in result]
    return [*fields, *(grad_scale.new_empty(0) if value is None else value for value in gradients), grad_scale]


@_loss_operator.register_fake
def _(tensors, present, head_constants, num_items, config, needs_grad, impl, workspace_bytes):  # type: ignore[no-untyped-def]
    named, auxiliary_hidden = _named(tensors, present)
    hidden, settings = named["student_hidden"], LossConfig.decode(config)
    num_rows, dtype = hidden.shape[0], statistics_dtype(hidden.dtype)

    def new(*shape, dtype=dtype):  # type: ignore[no-untyped-def]
        return hidden.new_empty(shape, dtype=dtype)

    fields_present = _present(len(auxiliary_hidden), "negative_hidden" in named, settings)
    shapes: list[tuple[int, ...]] = [()] * _SCALARS + [(num_rows,)] * 10
    shapes.append((len(auxiliary_hidden), num_rows))
    shapes.append((num_rows if settings.agreement == "token" else named["cu_seqlens"].shape[0] - 1,))
    fields = [
        new(*(shape if there else (0,)), dtype=torch.bool if there and name == "clipped" else dtype)
        for name, shape, there in zip(UniSDLoss._fields, shapes, fields_present, strict=True)
    ]
    gradients = [
        new(*named[name].shape) if is_needed else new(0)
        for name, is_needed in zip(_SLOTS[:_DIFFERENTIABLE], needs_grad, strict=True)
    ]
    return [*fields, *gradients, new()]


def _present(num_auxiliary: int, has_negative: bool, config: LossConfig) -> list[bool]:
    """Whether each field of UniSDLoss is there (not None)."""
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
    tensors, present, *others = inputs
    ctx.num_tensors, ctx.num_others = len(tensors), 1 + len(others)
    ctx.has_bias = present[_SLOTS.index("student_head.bias")]
    ctx.dtypes = (tensors[0].dtype, tensors[1].dtype)
    ctx.needs_grad = others[3]
    ctx.save_for_backward(*output[len(UniSDLoss._fields) :])


@first_order_only
def _backward(ctx: Any, upstream: list[torch.Tensor]) -> tuple[object, ...]:
    *gradients, grad_scale = ctx.saved_tensors
    kept = Gradients(*(value if there else None for value, there in zip(gradients, ctx.needs_grad, strict=True)))
    hidden, weight, bias = kept.scaled(upstream[0] * grad_scale, *ctx.dtypes)
    found = [hidden, weight, bias] if ctx.has_bias else [hidden, weight]
    return ([*found, *[None] * (ctx.num_tensors - len(found))], *(None,) * ctx.num_others)


_loss_operator.register_autograd(_backward, setup_context=_setup_context)
