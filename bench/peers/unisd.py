"""This package: its default implementation, or one by name."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.cases import Case
from bench.peers.step import Outcome, Step, differentiate, weighted_backward
from unisd_kernels import linear_divergence, linear_logprobs, unisd_loss
from unisd_kernels.config import LossInputs


def build(case: Case, beta: float, device: torch.device, impl: str | None = None) -> Step:
    def scoring(inputs: LossInputs) -> Outcome:
        with torch.no_grad():
            scores = linear_logprobs(
                inputs.student_hidden, inputs.student_head, inputs.target_ids, impl=impl, **case.options
            )
        return Outcome(scores.logprobs, None)

    def per_token(inputs: LossInputs) -> Outcome:
        divergence = linear_divergence(
            inputs.student_hidden,
            inputs.student_head,
            inputs.teacher_hidden,
            inputs.teacher_head,
            beta=beta,
            impl=impl,
            **case.options,
        )
        return weighted_backward(divergence, inputs)

    def trainable(inputs: LossInputs) -> Outcome:
        """`unisd_loss` without a view: it knows its weights in the forward, so it needs no second pass. Over one item
        it is `sum_n u_n D_n`."""
        result = unisd_loss(
            **replace(inputs, num_items=1).arguments(),
            normalization="token",
            weight_normalization="count",
            beta=beta,
            return_entropy=False,
            impl=impl,
            **case.options,
        )
        return Outcome(result.divergence, differentiate(result.loss, inputs))

    def unisd_star(inputs: LossInputs) -> Outcome:
        result = unisd_loss(**inputs.arguments(), beta=beta, impl=impl, **case.options)
        return Outcome(result.loss.detach(), differentiate(result.loss, inputs))

    if case.operation == "divergence":
        return per_token if case.frozen_head else trainable
    return scoring if case.operation == "scoring" else unisd_star
