"""TRL's chunked kernels composed: its divergence for student and teacher, its log-probabilities for every view."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Inputs
from bench.peers.reduction import combine


def build(inputs: Inputs, beta: float) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    weight, temperature = inputs.head.weight, inputs.case.options["temperature"]

    def logprobs(hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, inputs.target_ids, temperature, VOCAB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        divergence, _ = ChunkedDivergenceFunction.apply(
            inputs.student_hidden, weight, None, inputs.teacher_hidden, weight, None, beta, temperature
        )
        student = logprobs(inputs.student_hidden, temperature)
        with torch.no_grad():
            teacher = logprobs(inputs.teacher_hidden, temperature)
            negative = logprobs(inputs.negative_hidden, temperature)
            auxiliary = torch.stack([logprobs(hidden, 1.0) for hidden in inputs.auxiliary_hidden])
        loss = combine(inputs, divergence, student, teacher, negative, auxiliary)
        (gradient,) = torch.autograd.grad(loss, inputs.student_hidden)
        return loss.detach(), gradient

    return step
