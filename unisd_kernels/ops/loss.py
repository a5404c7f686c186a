"""`unisd_loss`: every mechanism of UniSD in one call, at the minimum number of matrix products."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from unisd_kernels import reference
from unisd_kernels.autocast import autocast_inputs
from unisd_kernels.backends.base import NeedsGrad
from unisd_kernels.backends.engine import Engine
from unisd_kernels.backends.registry import resolve
from unisd_kernels.batch import Batch, check_groups
from unisd_kernels.certified.views import check_views
from unisd_kernels.config import (
    AgreementLevel,
    AgreementStatistic,
    LossConfig,
    LossInputs,
    Normalization,
    ViewsDtype,
    WeightNormalization,
)
from unisd_kernels.heads import LMHead
from unisd_kernels.ops.autograd import recordable_inputs
from unisd_kernels.ops.loss_autograd import LossFunction
from unisd_kernels.ops.loss_compiled import loss_compiled
from unisd_kernels.results import UniSDLoss
from unisd_kernels.validation import check_loss_inputs, check_workspace

if TYPE_CHECKING:  # a torch may be built without it
    from torch.distributed import ProcessGroup


def unisd_loss(
    student_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    target_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    auxiliary_hidden: torch.Tensor | Sequence[torch.Tensor] | None = None,
    auxiliary_head: LMHead | None = None,
    negative_hidden: torch.Tensor | None = None,
    negative_head: LMHead | None = None,
    token_weights: torch.Tensor | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    clip_cap: float | None = None,
    clip_quantile: float | None = None,
    agreement: AgreementLevel = "token",
    agreement_statistic: AgreementStatistic = "variance",
    agreement_gamma: float = 0.01,
    weight_normalization: WeightNormalization | None = None,
    contrastive_weight: float = 0.1,
    contrastive_margin: float = 0.5,
    feature_weight: float = 0.0,
    divergence_weight: float = 1.0,
    normalization: Normalization = "sequence",
    num_items: float | torch.Tensor | None = None,
    weight_total: float | torch.Tensor | None = None,
    row_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    return_entropy: bool = True,
    return_statistics: bool = True,
    views_dtype: ViewsDtype | None = None,
    views_tolerance: float | None = None,
    impl: str | None = None,
    workspace_bytes: int | None = None,
) -> UniSDLoss:
    """The UniSD self-distillation loss of packed completion tokens, from hidden states, without any [N, V] tensor.

        L = divergence_weight  mean_b [ sum_{n in b} min(D_n, cap) w_n / max(sum_{n in b} w_n, 1) ]
          + contrastive_weight mean_b [ mean_{n in b} relu(margin + |lp_s - lp_t| - |lp_s - lp_n|) ]
          + feature_weight     mean_b [ mean_{n in b} mean_h (h_s - h_t)^2 ]

    D_n is the divergence of `linear_divergence`, w_n the agreement weight of `agreement_weights` times
    `token_weights`, lp the log-probability of the sampled token. A mechanism is on when its input is given
    (`auxiliary_hidden`, `negative_hidden`) or its setting is (`clip_*`, `feature_weight` > 0). An empty sequence
    contributes 0; without any row the loss is 0 with zero gradients and a warning.

    Matrix products of 2 N H V FLOPs: K + 1 scorings, student, teacher, and the gradient to the hidden states: K + 4
    with a frozen head, one more with a trainable one (its dW). Only `clip_quantile` together with a trainable head
    or a negative context costs two more, since the cap is then needed before the gradient. Terms of weight 0 cost their
    scorings unless `return_statistics=False`.

    Args:
        student_hidden: [N, H_s], the last hidden state (the one that enters the head) that predicts each completion
            token: float32, float64, bfloat16 or float16. Statistics are float32 (float64) whatever it is.
        student_head: see `LMHead`; weight and bias get a gradient if they require one.
        teacher_hidden: [N, H_t] of the same tokens under the teacher's context. Never gets a gradient.
        teacher_head: the teacher's head; the same number of columns as the student's.
        target_ids: [N] the sampled tokens, int64 or int32 in [0, V).
        cu_seqlens: [B + 1] int32 or int64 offsets of the sequences in the rows (`pack_rows` makes them).
        auxiliary_hidden: K tensors [N, H] (or one [K, N, H]) of the same tokens under auxiliary contexts.
        auxiliary_head: their head; None for the teacher's.
        negative_hidden: [N, H] of the same tokens under the negative context.
        negative_head: its head; None for the teacher's.
        token_weights: [N] extra weights on the divergence, >= 0, no gradient (e.g. from `agreement_weights`).
        beta: 0 forward KL, 1 reverse KL, between: generalized Jensen-Shannon.
        temperature: tau > 0 of divergence and contrastive term. Agreement is always scored at 1.
        clip_cap: constant cap on D_n in nats (the clip preset uses 10.0).
        clip_quantile: instead, cap = max(this quantile of D over the N tokens, 1e-6).
        agreement: "token" or "sequence"; with `agreement_statistic` "variance" or "range" and `agreement_gamma`.
        weight_normalization: "weighted" divides by max(sum w, 1), "count" by the number of tokens. None: "count" for
            sequence-level agreement (where "weighted" would cancel the weights), else "weighted".
        contrastive_weight, contrastive_margin, feature_weight, divergence_weight: as in the equation.
        normalization: "sequence" as above, or "token": one sum over all tokens by one count (or sum of weights).
        num_items: for gradient accumulation and data parallelism: the number of sequences (or, with "token",
            tokens) of the whole batch. The result is then this call's share, so that shares add up to the whole.
        weight_total: with `normalization="token"` and "weighted", the sum of weights of the whole batch, by which the
            divergence term is then divided; the other terms go by `num_items`.
        row_group: ranks that hold other rows of the same batch (data parallel, or the next). The quantiles (of token
            agreement, `clip_quantile`), sums of weights and counts of the equation are then those of all their rows;
            nothing else changes.
        sequence_group: ranks that hold other rows of the same B sequences (context or sequence parallel; a part of
            `row_group`, which is the same where it is None). Every rank has an entry in `cu_seqlens` for each of them.
        return_entropy: also return the entropies of student and teacher.
        return_statistics: also compute and return what only a term of weight 0 would need. False leaves such a term
            out, fields that belong to it are None (`UniSDLoss`): feature matching alone then costs no product at all.
        views_dtype: "int8" scores the auxiliary views with int8 products, each in an interval that holds the exact
            score, and exactly those tokens whose weight would be further off than `views_tolerance`. For the C++
            backend on a processor with AVX512_VNNI, and a head of the views that is frozen and stays as it is: its
            codes are made at the first call, and again when its weight has changed, which takes seconds.
            `auxiliary_logprobs` are then the middle of the intervals. docs/design.md, "Views in int8, certified".
        views_tolerance: with `views_dtype`, and only then: the largest error of an agreement weight, >= 0.
        impl: implementation by name (`unisd_kernels.available()`); None chooses.
        workspace_bytes: bound on the logits held at a time; None for the default.

    Returns:
        UniSDLoss; `loss` is the only differentiable field.

    With a group, each rank gets its own share: the losses of all ranks add up to the loss of the whole batch, as do
        their gradients with respect to shared weights; the gradient of a rank's rows is that of the whole. DDP takes
        the mean of the ranks, so give it `loss * torch.distributed.get_world_size(row_group)`. All ranks make the same
        call, also those without a row; it sends [N]-sized statistics in the forward (24 bytes and 4 a row for each
        quantile, padded to the rank with most rows), nothing in the backward. A rank that raises leaves the others
        waiting, as in any collective.

    Saved for backward: the gradients themselves, in float32: [N, H_s], and [V, H_s] and [V] for a trainable head.
        The backward multiplies them by the upstream scalar. Double backward is not supported and raises.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit, saying what was got. On an
            accelerator, values of `target_ids` and `cu_seqlens` are checked by device-side assertions.

    A NaN or infinity in the inputs gives a NaN loss; on a CPU a warning names the tensor. So does a logit that is not
    finite before the cap, minus infinity included: the statistics of its row are NaN.

    Under `torch.compile` the call is one operator of the graph; arguments are then checked when it runs, and there are
    no warnings. With a group, of ranks with other rows or of those that share a head (`LMHead(group=...)`), it breaks
    the graph and runs eagerly, which `fullgraph=True` refuses.

    Source: docs/design.md; UniSD, arXiv 2605.06597.
    """
    config = LossConfig(
        beta=beta,
        temperature=temperature,
        clip_cap=clip_cap,
        clip_quantile=clip_quantile,
        agreement=agreement,
        agreement_statistic=agreement_statistic,
        agreement_gamma=agreement_gamma,
        weight_normalization=weight_normalization,
        contrastive_weight=contrastive_weight,
        contrastive_margin=contrastive_margin,
        feature_weight=feature_weight,
        divergence_weight=divergence_weight,
        normalization=normalization,
        return_entropy=return_entropy,
        return_statistics=return_statistics,
        views_dtype=views_dtype,
        views_tolerance=views_tolerance,
    )
    inputs = LossInputs(
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        target_ids=target_ids,
        cu_seqlens=cu_seqlens,
        auxiliary_hidden=_views(auxiliary_hidden),
        auxiliary_head=auxiliary_head,
        negative_hidden=negative_hidden,
        negative_head=negative_head,
        token_weights=token_weights,
        num_items=num_items,
        weight_total=weight_total,
    )
    check_workspace(workspace_bytes)
    groups = (row_group, sequence_group)
    if torch.compiler.is_compiling() and (impl or os.environ.get("UNISD_IMPL")) != "reference":
        # A process group has no place in an operator's schema: the graph breaks there.
        if groups == (None, None) and all(head.group is None for head in inputs.heads):
            return loss_compiled(autocast_inputs(inputs), config, impl, workspace_bytes)
        return torch.compiler.disable(_loss)(inputs, config, groups, impl, workspace_bytes)
    return _loss(inputs, config, groups, impl, workspace_bytes)


def _loss(
    inputs: LossInputs,
    config: LossConfig,
    groups: tuple[ProcessGroup | None, ProcessGroup | None],
    impl: str | None,
    workspace_bytes: int | None,
) -> UniSDLoss:
    """`unisd_loss` in eager mode."""
    check_loss_inputs(inputs, config)
    check_groups(*groups)
    student_hidden = inputs.student_hidden
    implementation = resolve(impl, student_hidden.device, student_hidden.dtype)
    inputs = autocast_inputs(inputs)
    check_views(inputs, config, implementation.name, groups != (None, None))
    batch = Batch.of(inputs.cu_seqlens, inputs.num_rows, *groups, call=_call(inputs, config))
    if batch.num_rows == 0:
        warnings.warn(
            "unisd_loss got no rows (every completion token is masked): the loss is 0 with zero gradients",
            stacklevel=3,
        )
    with torch.autocast(student_hidden.device.type, enabled=False):
        if implementation.backend is None:
            if batch.row_group is not None:
                raise ValueError(
                    "impl='reference' knows one process only: give it the rows of all ranks, or choose another impl"
                )
            result = reference.unisd_loss(recordable_inputs(inputs), config)
        else:
            student = (inputs.student_hidden, inputs.student_head.active_weight, inputs.student_head.active_bias)
            needs_grad = NeedsGrad.of(*student)
            engine = Engine.of(implementation.backend(), workspace_bytes, student_hidden.device, needs_grad.weight)
            result = UniSDLoss(*LossFunction.apply(*student, inputs, config, needs_grad, engine, batch))
    if result.loss.device.type == "cpu" and not bool(torch.isfinite(result.loss)):
        warnings.warn(f"unisd_loss is {float(result.loss.detach())}: {_blame(inputs)}", stacklevel=3)
    return result


def _call(inputs: LossInputs, config: LossConfig) -> tuple[object, ...]:
    """What ranks have to agree on, since it says which messages there are."""
    return (
        "unisd_loss",
        str(inputs.student_hidden.dtype),
        len(inputs.auxiliary_hidden),
        inputs.negative_hidden is not None,
        inputs.num_items is not None,
        inputs.weight_total is not None,
        config,
    )


def _views(auxiliary_hidden: torch.Tensor | Sequence[torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
    if auxiliary_hidden is None:
        return ()
    if isinstance(auxiliary_hidden, torch.Tensor):
        if auxiliary_hidden.dim() != 3:
            raise ValueError(
                "auxiliary_hidden must have shape [K, N, H] or be K tensors [N, H], got "
                f"{tuple(auxiliary_hidden.shape)}"
            )
        return auxiliary_hidden.unbind(0)
    if isinstance(auxiliary_hidden, (str, bytes, Mapping)) or not isinstance(auxiliary_hidden, Iterable):
        raise TypeError(
            f"auxiliary_hidden must be a tensor [K, N, H] or K tensors [N, H], got {type(auxiliary_hidden).__name__}"
        )
    return tuple(auxiliary_hidden)


def _blame(inputs: LossInputs) -> str:
    """Name the inputs that are not finite."""
    tensors = {
        "student_hidden": inputs.student_hidden,
        "teacher_hidden": inputs.teacher_hidden,
        "negative_hidden": inputs.negative_hidden,
        "token_weights": inputs.token_weights,
        **{f"auxiliary_hidden[{k}]": hidden for k, hidden in enumerate(inputs.auxiliary_hidden)},
    }
    for name in ("student_head", "teacher_head", "auxiliary_head", "negative_head"):
        head = getattr(inputs, name)
        if head is not None:
            tensors |= {f"{name}.weight": head.active_weight, f"{name}.bias": head.active_bias}
    bad = [name for name, tensor in tensors.items() if tensor is not None and not bool(tensor.isfinite().all())]
    if not bad:
        return "the inputs are finite, so logits overflowed"
    return f"not finite: {', '.join(bad)}"
