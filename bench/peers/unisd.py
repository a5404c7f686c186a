"""This package: its default implementation, or one by name."""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.inputs import Inputs
from bench.peers.step import Outcome, Step, differentiate, weighted_backward
from unisd_kernels import linear_divergence, linear_logprobs, unisd_loss


def build(case: Case, beta: float, device: torch.device, impl: str | None = None) -> Step:
    def scoring(inputs: Inputs) -> Outcome:
        with torch.no_grad():
            scores = linear_logprobs(inputs.student_hidden, inputs.head, inputs.target_ids, impl=impl, **case.options)
        return Outcome(scores.logprobs, None)

    def per_token(inputs: Inputs) -> Outcome:
        head = inputs.head
        divergence = linear_divergence(
            inputs.student_hidden, head, inputs.teacher_hidden, head.detach(), beta=beta, impl=impl, **case.options
        )
        return weighted_backward(divergence, inputs)

    def trainable(inputs: Inputs) -> Outcome:
        """`unisd_loss` without a view: it knows its weights in the forward, so it needs no second pass."""
        result = unisd_loss(
            inputs.student_hidden,
            inputs.head,
            inputs.teacher_hidden,
            inputs.head.detach(),
            inputs.target_ids,
            inputs.cu_seqlens,
            token_weights=inputs.token_weights,
            weight_normalization="count",
            beta=beta,
            return_entropy=False,
            impl=impl,
            **case.options,
        )
        return Outcome(result.divergence, differentiate(result.loss, inputs))

    def unisd_star(inputs: Inputs) -> Outcome:
        result = unisd_loss(
            inputs.student_hidden,
            inputs.head,
            inputs.teacher_hidden,
            inputs.head.detach(),
            inputs.target_ids,
            inputs.cu_seqlens,
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
