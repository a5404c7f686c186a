"""The float64 reference of a case's first sequence, and how far a contender is from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.cases import Inputs
from bench.peers.step import Outcome
from unisd_kernels import LMHead, reference
from unisd_kernels.spec import LossInputs, LossSpec

# Of one [rows, V] float64 tensor; the reference holds several.
LARGEST_TENSOR = 1_000_000_000


@dataclass(frozen=True)
class Expected:
    """float64, of the first sequence's rows.

    Attributes:
        values: D or the log-probabilities [rows]; None for "unisd_loss", whose value is of all rows.
        gradients: of the student's hidden states [rows, H]; None for "scoring".
        mean_gradients: the same for the mean of D over all rows; for "divergence" only.
    """

    rows: int
    values: torch.Tensor | None
    gradients: torch.Tensor | None
    mean_gradients: torch.Tensor | None = None

    def errors(self, outcome: Outcome, mean_only: bool = False) -> dict[str, float]:
        """Relative errors, by Frobenius norms: `value_error` and `gradient_error`, where there is one to compare."""
        errors = {}
        if self.values is not None and outcome.value is not None and not mean_only:
            errors["value_error"] = relative_error(outcome.value[: self.rows], self.values)
        gradients = self.mean_gradients if mean_only else self.gradients
        if gradients is not None and outcome.gradient is not None:
            errors["gradient_error"] = relative_error(outcome.gradient[: self.rows], gradients)
        return errors


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def expected_outcome(inputs: Inputs, beta: float) -> Expected:
    """Raises ValueError where a [rows, V] float64 tensor of the first sequence would exceed one gigabyte."""
    case = inputs.case
    rows = int(inputs.cu_seqlens[1])
    if rows * case.vocab_size * 8 > LARGEST_TENSOR:
        raise ValueError(f"{case.name}: the first sequence has {rows} rows, too many for a float64 reference")
    head = LMHead(inputs.head.weight.detach().double())
    hidden = inputs.student_hidden.detach()[:rows].double()
    if case.operation == "scoring":
        scores = reference.linear_logprobs(hidden, head, inputs.target_ids[:rows], case.options["temperature"])
        return Expected(rows, scores.logprobs, None)
    hidden.requires_grad_()
    if case.operation == "unisd_loss":
        return Expected(rows, None, _loss_gradient(inputs, beta, head, hidden))
    teacher = inputs.teacher_hidden[:rows].double()
    divergence = reference.linear_divergence(hidden, head, teacher, head, beta, case.options["temperature"])
    # Row n's gradient is that of D_n, so any upstream vector is a row scaling of this one.
    (gradients,) = torch.autograd.grad(divergence.sum(), hidden)
    weighted = gradients * inputs.upstream[:rows, None].double()
    return Expected(rows, divergence.detach(), weighted, gradients / case.num_rows)


def _agreement_weights(inputs: Inputs) -> torch.Tensor:
    """Token-level agreement couples all rows through its quantile: so of every row, from float32 scores, by the dense
    formula on a few rows at a time."""
    head = LMHead(inputs.head.weight.detach().float())
    step = max(1, LARGEST_TENSOR // (8 * inputs.case.vocab_size))
    scores = [
        torch.cat(
            [
                reference.linear_logprobs(rows.float(), head, targets).logprobs
                for rows, targets in zip(view.split(step), inputs.target_ids.split(step), strict=True)
            ]
        )
        for view in inputs.auxiliary_hidden
    ]
    gamma = inputs.case.options["agreement_gamma"]
    return reference.agreement_weights(torch.stack(scores).double(), inputs.cu_seqlens, gamma=gamma).weights


def _loss_gradient(inputs: Inputs, beta: float, head: LMHead, hidden: torch.Tensor) -> torch.Tensor:
    case, rows = inputs.case, hidden.shape[0]
    weights = _agreement_weights(inputs)[:rows]
    options = {k: v for k, v in case.options.items() if k != "agreement_gamma"}
    assert inputs.negative_hidden is not None
    result = reference.unisd_loss(
        LossInputs(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=inputs.teacher_hidden[:rows].double(),
            teacher_head=head,
            target_ids=inputs.target_ids[:rows],
            cu_seqlens=torch.tensor([0, rows], device=hidden.device),
            negative_hidden=inputs.negative_hidden[:rows].double(),
            token_weights=weights,
            num_items=case.num_sequences,
        ),
        LossSpec(beta=beta, return_entropy=False, **options),
    )
    return torch.autograd.grad(result.loss, hidden)[0]
