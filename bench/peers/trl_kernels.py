"""TRL's chunked kernels composed: its divergence for student and teacher, its log-probabilities for every view."""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.peers.reduction import combine
from bench.peers.step import Outcome, Step, differentiate, weighted_backward
from unisd_kernels.config import LossInputs


def build(case: Case, beta: float, device: torch.device) -> Step:
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    tau = case.options["temperature"]

    def logprobs(inputs: LossInputs, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, inputs.student_head.weight, None, inputs.target_ids, temperature, VOCAB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    def divergence(inputs: LossInputs) -> torch.Tensor:
        weight = inputs.student_head.weight
        return ChunkedDivergenceFunction.apply(
            inputs.student_hidden, weight, None, inputs.teacher_hidden, weight, None, beta, tau
        )[0]

    def scoring(inputs: LossInputs) -> Outcome:
        with torch.no_grad():
            return Outcome(logprobs(inputs, inputs.student_hidden, tau), None)

    def per_token(inputs: LossInputs) -> Outcome:
        return weighted_backward(divergence(inputs), inputs)

    def unisd_star(inputs: LossInputs) -> Outcome:
        assert inputs.negative_hidden is not None
        student = logprobs(inputs, inputs.student_hidden, tau)
        with torch.no_grad():
            teacher = logprobs(inputs, inputs.teacher_hidden, tau)
            negative = logprobs(inputs, inputs.negative_hidden, tau)
            views = [logprobs(inputs, hidden, 1.0) for hidden in inputs.auxiliary_hidden]
            auxiliary = torch.stack(views) if views else negative.new_empty(0, len(negative))
        loss = combine(case, inputs, divergence(inputs), student, teacher, negative, auxiliary)
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return {"scoring": scoring, "divergence": per_token, "unisd_loss": unisd_star}[case.operation]
