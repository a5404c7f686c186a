"""`linear_logprobs`: log-probability, log-sum-exp and entropy from hidden states, without the logits."""

from __future__ import annotations

from typing import Any

import torch

from unisd_kernels import reference
from unisd_kernels.autocast import autocast_operands
from unisd_kernels.backends.base import NeedsGrad, ScoreGrads, Scores
from unisd_kernels.backends.buffers import rows_of
from unisd_kernels.backends.engine import Engine
from unisd_kernels.backends.hidden_sum import HiddenSum
from unisd_kernels.backends.projection import Projection
from unisd_kernels.backends.registry import resolve
from unisd_kernels.backends.transform import LogitTransform
from unisd_kernels.config import check_flag, check_number
from unisd_kernels.heads import LMHead
from unisd_kernels.heads.shard import VocabShard
from unisd_kernels.ops.autograd import first_order_only, recordable, recordable_head, save, saved
from unisd_kernels.results import LinearLogProbs
from unisd_kernels.validation import check_hidden, check_target_ids, check_workspace

# What a projection has besides tensors.
_Form = tuple[LogitTransform, VocabShard | None]


def linear_logprobs(
    hidden: torch.Tensor,
    head: LMHead,
    target_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    impl: str | None = None,
    workspace_bytes: int | None = None,
) -> LinearLogProbs:
    """Score one target id a row, without holding the [N, V] logits.

        z = softcap_c(a (h W^T + b)) / tau,  logp(y) = z_y - logsumexp(z),  entropy = logsumexp(z) - sum_j p_j z_j

    One matrix product without gradient (an online log-sum-exp over vocabulary tiles). With a gradient to a frozen
    head's hidden states and no entropy it is two in total: both statistics' row gradients are linear in the row
    `(p W)_n`, which is computed in the forward and scaled in the backward. Otherwise the backward recomputes the
    logits: one product more, plus one for each gradient.

    Args:
        hidden: [N, H] rows in the head's dtype: float32, float64, bfloat16 or float16. May require a gradient.
        head: see `LMHead`; its weight and bias get a gradient if they require one.
        target_ids: [N] int64 or int32, in [0, V).
        temperature: tau > 0.
        return_entropy: also return the entropy.
        impl: implementation by name (`unisd_kernels.available()`); None chooses.
        workspace_bytes: bound on the logits held at a time; None for the default (`docs/design.md`).

    Returns:
        LinearLogProbs(logprobs, logsumexp, entropy), each [N] float32 (float64 for float64 inputs), in nats; each
        differentiable. NaN where a logit of the row is NaN or infinite (also minus infinity, and whatever a cap would
        make of it).

    Saved for backward: frozen head, no entropy: [N, H] row gradients in float32, the weight and target ids;
    otherwise the inputs and three [N] statistics. Tensors made under `torch.inference_mode()` are as good as others.
    Double backward raises.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit, saying what was got.

    Source: docs/design.md; the online log-sum-exp is Milakov and Gimelshein, arXiv 1805.02867.
    """
    check_hidden("hidden", hidden, head, "head")
    check_number("temperature", temperature, low=0.0, open_low=True)
    check_flag("return_entropy", return_entropy)
    check_workspace(workspace_bytes)
    implementation = resolve(impl, hidden.device, hidden.dtype)
    backend = None if implementation.backend is None else implementation.backend()
    needs_grad = NeedsGrad.of(hidden, head.active_weight, head.active_bias)
    # Of a slice of a vocabulary the kernel sees no id but its own.
    kernel_asserts = backend is not None and backend.score_asserts_ids and not needs_grad.any and head.shard is None
    check_target_ids(target_ids, hidden.shape[0], head.num_columns, hidden.device, kernel_asserts=kernel_asserts)
    hidden, head = autocast_operands(hidden, head)
    if backend is None:
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.linear_logprobs(
                recordable(hidden), recordable_head(head), recordable(target_ids), temperature, return_entropy
            )
    target_ids = target_ids.long()
    weight, bias = head.active_weight, head.active_bias
    engine = Engine.of(backend, workspace_bytes, hidden.device, needs_grad.weight)
    form = LogitTransform.of(head, temperature), head.shard
    if not needs_grad.any:
        projection = Projection(hidden, weight, bias, *form)
        return LinearLogProbs(*engine.score(projection, target_ids, return_entropy))
    if not needs_grad.head and not return_entropy:
        logprobs, logsumexp = _FrozenHeadLogProbs.apply(hidden, weight, bias, target_ids, form, engine)
        return LinearLogProbs(logprobs, logsumexp, None)
    outputs = _LinearLogProbs.apply(hidden, weight, bias, target_ids, form, return_entropy, engine)
    return LinearLogProbs(*outputs)


class _LinearLogProbs(torch.autograd.Function):
    """Scores with a trainable head, or an entropy to differentiate: the backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target_ids: torch.Tensor,
        form: _Form,
        return_entropy: bool,
        engine: Engine,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.settings = (form, engine)
        projection = Projection(hidden, weight, bias, *form).detach()
        scores = engine.score(projection, target_ids, return_entropy)
        save(ctx, hidden, weight, bias, target_ids, *scores)
        return tuple(scores)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if all(gradient is None for gradient in upstream):
            return (None,) * 7
        hidden, weight, bias, target_ids, *statistics = saved(ctx)
        form, engine = ctx.settings
        gradients = engine.score_gradients(
            Projection(hidden, weight, bias, *form),
            target_ids,
            Scores(*statistics),
            ScoreGrads(*upstream),
            NeedsGrad(*ctx.needs_input_grad[:3]),
        )
        return (*gradients.scaled(None, hidden.dtype, weight.dtype), *(None,) * 4)


class _FrozenHeadLogProbs(torch.autograd.Function):
    """Scores with a frozen head: the row gradients are made in the forward, the backward scales rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target_ids: torch.Tensor,
        form: _Form,
        engine: Engine,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.form = form
        projection = Projection(hidden, weight, bias, *form).detach()
        scores, gradient = engine.score_with_gradient(projection, target_ids)
        save(ctx, hidden, weight, target_ids, scores.logprobs, scores.logsumexp, gradient)
        return scores.logprobs, scores.logsumexp

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, logprob_weight: torch.Tensor | None, logsumexp_weight: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if logprob_weight is None and logsumexp_weight is None:
            return (None,) * 6
        hidden, weight, target_ids, logprobs, logsumexp, gradient = saved(ctx)
        on_logsumexp = torch.zeros_like(logsumexp)
        if logsumexp_weight is not None:
            on_logsumexp = on_logsumexp + logsumexp_weight
        if logprob_weight is not None:
            on_logsumexp = on_logsumexp - logprob_weight
        projection = Projection(hidden, weight, None, *ctx.form)
        ids = target_ids if projection.shard is None else projection.shard.local_ids(target_ids)
        result = torch.empty_like(gradient)
        total = HiddenSum(projection.shard, result)
        for rows in total.pieces(result.shape[0]):
            out = rows_of(result, rows)
            torch.mul(rows_of(gradient, rows), rows_of(on_logsumexp, rows).unsqueeze(-1), out=out)
            if logprob_weight is not None:
                logits = rows_of(logprobs, rows) + rows_of(logsumexp, rows)
                part = projection.of_rows(rows_of(hidden, rows))
                target_gradient = part.target_gradient(rows_of(ids, rows), logits)
                out.addcmul_(target_gradient, rows_of(logprob_weight, rows).unsqueeze(-1))
            total.written(rows.stop)
        total.finish()
        return (result.to(hidden.dtype), *(None,) * 5)
