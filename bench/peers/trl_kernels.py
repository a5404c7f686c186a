"""TRL's chunked kernels composed: its divergence for student and teacher, its log-probabilities for every view."""

from __future__ import annotations

import torch

from bench.cases import Inputs
from bench.peers.reduction import combine
from bench.peers.step import Outcome, Step, differentiate, weighted_backward


def build(inputs: Inputs, beta: float) -> Step:
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    weight, temperature = inputs.head.weight, inputs.case.options["temperature"]

    def logprobs(hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, inputs.target_ids, temperature, VOCAB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    def divergence() -> torch.Tensor:
        return ChunkedDivergenceFunction.apply(
            inputs.student_hidden, weight, None, inputs.teacher_hidden, weight, None, beta, temperature
        )[0]

    def scoring() -> Outcome:
        with torch.no_grad():
            return Outcome(logprobs(inputs.student_hidden, temperature), None)

    def per_token() -> Outcome:
        return weighted_backward(divergence(), inputs)

    def unisd_star() -> Outcome:
        assert inputs.negative_hidden is not None
        student = logprobs(inputs.student_hidden, temperature)
        with torch.no_grad():
            teacher = logprobs(inputs.teacher_hidden, temperature)
            negative = logprobs(inputs.negative_hidden, temperature)
            auxiliary = torch.stack([logprobs(hidden, 1.0) for hidden in inputs.auxiliary_hidden])
        loss = combine(inputs, divergence(), student, teacher, negative, auxiliary)
        return Outcome(loss.detach(), differentiate(loss, inputs))

    return {"scoring": scoring, "divergence": per_token, "unisd_loss": unisd_star}[inputs.case.operation]
