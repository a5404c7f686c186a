"""The float64 reference of a case's first sequence, how far a peer is from it, and how far it may be.

A peer may be twice as far as the dense formulas in the operands' own dtype with float32 statistics, plus a floor:
`error <= 2 * native error + ERROR_FLOOR`, all relative by Frobenius norms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.cases import Case
from bench.peers import dense
from bench.peers.reduction import combine
from bench.peers.step import Outcome
from unisd_kernels import LMHead, reference
from unisd_kernels.config import LossConfig, LossInputs

# Bytes of one [rows, V] float64 tensor; the reference holds several.
LARGEST_TENSOR = 1_000_000_000
ERROR_FLOOR = 1e-5


@dataclass(frozen=True)
class Expected:
    """Value and gradients of the first sequence's rows, and how far a peer may be from them.

    Attributes:
        values: float64 D or log-probabilities [rows]; None for "unisd_loss", whose value is of all rows.
        gradients: float64, of the student's hidden states [rows, H]; None for "scoring".
        upstream: the gradients' scale in a loss that is the mean of D over all rows, [rows, 1]; for "divergence" only.
        limits: of `value_error` and `gradient_error`.
    """

    rows: int
    values: torch.Tensor | None
    gradients: torch.Tensor | None
    upstream: torch.Tensor | None
    limits: dict[str, float]

    def errors(self, outcome: Outcome, mean_only: bool = False) -> dict[str, float]:
        """Relative errors, by Frobenius norms: `value_error` and `gradient_error`, where there is one to compare."""
        errors = {}
        if self.values is not None and outcome.value is not None and not mean_only:
            errors["value_error"] = relative_error(outcome.value[: self.rows], self.values)
        if self.gradients is not None and outcome.gradient is not None:
            gradients = self.gradients
            if mean_only:
                assert self.upstream is not None
                gradients = gradients * self.upstream
            errors["gradient_error"] = relative_error(outcome.gradient[: self.rows], gradients)
        return errors

    def limits_of(self, errors: dict[str, float]) -> dict[str, float]:
        return {f"{name}_limit": self.limits[name] for name in errors}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def expected_outcome(case: Case, inputs: LossInputs, beta: float) -> Expected:
    """The first sequence in float64, with the limits of the errors.

    Raises:
        ValueError: a [rows, V] float64 tensor of the first sequence would exceed one gigabyte.
    """
    rows = int(inputs.cu_seqlens[1])
    if rows * case.vocab_size * 8 > LARGEST_TENSOR:
        raise ValueError(f"{case.name}: the first sequence has {rows} rows, too many for a float64 reference")
    first = _first_sequence(case, inputs, rows)
    exact = _exact_outcome(case, first, beta)
    native = _native_outcome(case, first, beta)
    upstream = None
    if case.operation == "divergence":
        assert first.token_weights is not None
        # What `weighted_backward` gives, over what the mean of D gives.
        upstream = 1 / (case.num_rows * first.token_weights[:, None].double())
    expected = Expected(rows, exact.value, exact.gradient, upstream, {})
    limits = {name: 2 * error + ERROR_FLOOR for name, error in expected.errors(native).items()}
    return replace(expected, limits=limits)


def _first_sequence(case: Case, inputs: LossInputs, rows: int) -> LossInputs:
    """The first rows alone; for "unisd_loss" with their weights of agreement, and the share of one sequence of all."""

    def part(tensor: torch.Tensor) -> torch.Tensor:
        """[rows, ...]"""
        return tensor.detach()[:rows]

    weights = _agreement_weights(case, inputs) if case.operation == "unisd_loss" else inputs.token_weights
    return replace(
        inputs,
        student_hidden=part(inputs.student_hidden).clone().requires_grad_(),
        teacher_hidden=part(inputs.teacher_hidden),
        target_ids=inputs.target_ids[:rows],
        cu_seqlens=torch.tensor([0, rows], dtype=inputs.cu_seqlens.dtype, device=inputs.cu_seqlens.device),
        auxiliary_hidden=tuple(part(hidden) for hidden in inputs.auxiliary_hidden),
        negative_hidden=None if inputs.negative_hidden is None else part(inputs.negative_hidden),
        token_weights=None if weights is None else weights[:rows],
        num_items=inputs.num_sequences,
    )


def _native_outcome(case: Case, first: LossInputs, beta: float) -> Outcome:
    """The dense formulas in the operands' dtype with float32 statistics."""
    if case.operation != "unisd_loss":
        return dense.build(case, beta, first.student_hidden.device)(first)
    assert first.negative_hidden is not None
    assert first.token_weights is not None
    assert first.num_items is not None
    rows = dense.statistics(
        first.student_hidden,
        first.teacher_hidden,
        first.negative_hidden,
        first.auxiliary_hidden,
        first.student_head.weight,
        first.target_ids,
        beta,
        case.options["temperature"],
        torch.float32,
    )
    loss = combine(case, first, *rows, weights=first.token_weights.float()) / first.num_items
    return Outcome(None, torch.autograd.grad(loss, first.student_hidden)[0])


def _exact_outcome(case: Case, first: LossInputs, beta: float) -> Outcome:
    """The reference in float64."""
    head = LMHead(first.student_head.weight.detach().double())
    hidden = first.student_hidden.detach().double()
    if case.operation == "scoring":
        scores = reference.linear_logprobs(hidden, head, first.target_ids, case.options["temperature"])
        return Outcome(scores.logprobs, None)
    hidden.requires_grad_()
    teacher = first.teacher_hidden.double()
    assert first.token_weights is not None
    if case.operation == "divergence":
        divergence = reference.linear_divergence(hidden, head, teacher, head, beta, case.options["temperature"])
        return Outcome(divergence.detach(), torch.autograd.grad(divergence, hidden, first.token_weights.double())[0])
    assert first.negative_hidden is not None
    options = {k: v for k, v in case.options.items() if k != "agreement_gamma"}
    exact = replace(
        first,
        student_hidden=hidden,
        student_head=head,
        teacher_hidden=teacher,
        teacher_head=head,
        auxiliary_hidden=(),
        negative_hidden=first.negative_hidden.double(),
    )
    result = reference.unisd_loss(exact, LossConfig(beta=beta, return_entropy=False, **options))
    return Outcome(None, torch.autograd.grad(result.loss, hidden)[0])


def _agreement_weights(case: Case, inputs: LossInputs) -> torch.Tensor:
    """[N] weights of every row, since token-level agreement couples all rows through its quantile: from float32 scores,
    by the dense formula on a few rows at a time."""
    if not inputs.auxiliary_hidden:
        return torch.ones(len(inputs.target_ids), dtype=torch.float64, device=inputs.target_ids.device)
    head = LMHead(inputs.student_head.weight.detach().float())
    step = max(1, LARGEST_TENSOR // (8 * case.vocab_size))
    scores = [
        torch.cat(
            [
                reference.linear_logprobs(rows.float(), head, targets).logprobs
                for rows, targets in zip(view.split(step), inputs.target_ids.split(step), strict=True)
            ]
        )
        for view in inputs.auxiliary_hidden
    ]
    gamma = case.options["agreement_gamma"]
    return reference.agreement_weights(torch.stack(scores).double(), inputs.cu_seqlens, gamma=gamma).weights
