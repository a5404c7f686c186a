"""This package: its default implementation, or one by name."""

from __future__ import annotations

import torch

from bench.cases import Inputs
from bench.peers.step import Outcome, Step, differentiate, weighted_backward
from unisd_kernels import linear_divergence, linear_logprobs, unisd_loss


def build(inputs: Inputs, beta: float, impl: str | None = None) -> Step:
    case, head = inputs.case, inputs.head
    packing = (inputs.target_ids, inputs.cu_seqlens)

    def scoring() -> Outcome:
        with torch.no_grad():
            scores = linear_logprobs(inputs.student_hidden, head, inputs.target_ids, impl=impl, **case.options)
        return Outcome(scores.logprobs, None)

    def per_token() -> Outcome:
        divergence = linear_divergence(
            inputs.student_hidden, head, inputs.teacher_hidden, head.detach(), beta=beta, impl=impl, **case.options
        )
        return weighted_backward(divergence, inputs)

    def trainable() -> Outcome:
        """`unisd_loss` without a view: it knows its weights in the forward, so it needs no second pass."""
        result = unisd_loss(
            inputs.student_hidden,
            head,
            inputs.teacher_hidden,
            head.detach(),
            *packing,
            token_weights=inputs.token_weights,
            weight_normalization="count",
            beta=beta,
            return_entropy=False,
            impl=impl,
            **case.options,
        )
        return Outcome(result.divergence, differentiate(result.loss, inputs))

    def unisd_star() -> Outcome:
        result = unisd_loss(
            inputs.student_hidden,
            head,
            inputs.teacher_hidden,
            head.detach(),
            *packing,
            auxiliary_hidden=inputs.auxiliary_hidden,
            negative_hidden=inputs.negative_hidden,
            beta=beta,
            impl=impl,
            **case.options,
        )
        return Outcome(result.loss.detach(), differentiate(result.loss, inputs))

    if case.operation == "divergence":
        return per_token if case.frozen_head else trainable
    return scoring if case.operation == "scoring" else unisd_star
