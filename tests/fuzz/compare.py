"""One case, run by an implementation and held against the oracle."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from tests.fuzz import oracle
from tests.fuzz.cases import Case
from tests.fuzz.oracle import LONG, Bounded
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss

# Rounding of arithmetic, and of one store in the operands' dtype.
ARITHMETIC = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24}
STORE = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Below these a number of the dtype is denormal, or zero.
SMALLEST = {torch.float64: 1e-300, torch.float32: 1e-36, torch.bfloat16: 1e-36, torch.float16: 6e-8}
# Of D, and of what is summed of it: a JSD of the fused Triton kernel, with a gradient, sums what it keeps in 16 bits.
SUMS_OF_STORED = 2.0**-10
# First-order bounds meet the real sums with this much room.
SLACK = 8.0


def as_numpy(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().numpy()


def as_head(head: LMHead) -> oracle.Head:
    weight = as_numpy(head.weight)
    assert weight is not None
    return oracle.Head(weight, as_numpy(head.bias), head.logit_scale, head.softcap, head.num_columns)


class Expectation:
    """What the oracle says of a case: named values, and gradients of `sum(upstream * values)` or of the loss."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.unit = ARITHMETIC[case.dtype]
        self.hidden, self.head = as_numpy(case.student), as_head(case.student_head)
        self.student = oracle.logits(self.hidden, self.head, case.temperature, self.unit)
        self.values: dict[str, Bounded] = {}
        # A threshold that rounding may decide either way: nothing is to be compared then.
        self.undecided = False
        # What a row's gradient is multiplied with after it was stored, at most: a number or [N, 1].
        self._later: np.ndarray | float = 1.0
        per_logit, features = getattr(self, f"_{case.operation}")()
        if case.dtype in (torch.bfloat16, torch.float16):
            # 16-bit operands allow the logits of a gradient to be kept in 16 bits, relative to the row's largest.
            lp = oracle.log_softmax(self.student.z)
            kept = 2 * STORE[case.dtype] * (np.abs(per_logit.value) + np.exp(lp) * np.abs(lp) * self._share)
            per_logit = Bounded(per_logit.value, per_logit.error + kept)
        absolute: np.ndarray | float = 0.0
        if case.dtype == torch.float16:
            # The operands of the gradient's products have the dtype of the others. Of the gradient with respect to
            # a x / tau float16 has multiples of 2^-24 where it is smallest: it is off by 2^-25, and that with respect
            # to x by a / tau of it. A sum of such errors is no larger than the sum of the bounds, without any slack.
            absolute = 2.0**-25 * self._later * abs(self.head.scale) / case.temperature / SLACK
        self.gradients = oracle.pull_back(per_logit, self.student, self.hidden, self.head, absolute)
        if features is not None:
            value, error = self.gradients["hidden"].value + features, self.gradients["hidden"].error
            self.gradients["hidden"] = Bounded(value, error + 8 * self.unit * np.abs(features))

    def _teacher(self, hidden: torch.Tensor, temperature: float) -> oracle.Logits:
        array = as_numpy(hidden)
        assert array is not None
        return oracle.logits(array, as_head(self.case.teacher_head), temperature, self.unit)

    def _divergence(self) -> tuple[Bounded, None]:
        teacher = self._teacher(self.case.teacher, self.case.temperature)
        value, gradient = oracle.divergence(self.student, teacher, self.case.beta, self.unit)
        self.values = {"divergence": value}
        upstream = self.case.upstream[0].numpy().astype(LONG)[:, None]
        # Before or after: with a trainable head it comes first.
        self._later = np.maximum(np.abs(upstream), 1)
        self._share = np.abs(upstream) * (1 + np.abs(value.value[:, None]))
        return Bounded(gradient.value * upstream, gradient.error * np.abs(upstream)), None

    def _logprobs(self) -> tuple[Bounded, None]:
        ids = self.case.ids.numpy()
        self.values = oracle.statistics(self.student, ids, self.unit)
        of_lp, of_entropy = oracle.logprob_gradient(self.student, ids), oracle.entropy_gradient(self.student)
        p = np.exp(oracle.log_softmax(self.student.z))
        u_lp, u_lse, u_entropy = (each.numpy().astype(LONG)[:, None] for each in self.case.upstream)
        gradient = of_lp.value * u_lp + p * u_lse + of_entropy.value * u_entropy
        error = of_lp.error * np.abs(u_lp) + p * oracle.log_p_error(self.student) * np.abs(u_lse)
        self._share = np.abs(u_lp) + np.abs(u_lse) + np.abs(u_entropy)
        self._later = np.maximum(self._share, 1)
        # Terms of both signs: each is rounded by itself.
        terms = np.abs(of_lp.value * u_lp) + p * np.abs(u_lse) + np.abs(of_entropy.value * u_entropy)
        return Bounded(gradient, error + of_entropy.error * np.abs(u_entropy) + 8 * self.unit * terms), None

    def _loss(self) -> tuple[Bounded, np.ndarray | None]:
        case, options, unit = self.case, self.case.options, self.unit
        ids, cu = case.ids.numpy(), case.cu.numpy()
        rows = len(ids)
        teacher = self._teacher(case.teacher, case.temperature)
        d, d_gradient = oracle.divergence(self.student, teacher, case.beta, unit)
        by_sequence = options["normalization"] == "sequence"
        cap = options["clip_cap"]
        kept, open_ = d.value, np.ones(rows, bool)
        if cap is not None:
            self.undecided |= bool((np.abs(d.value - cap) <= SLACK * d.error + 1e-9).any())
            kept, open_ = np.minimum(d.value, LONG(cap)), d.value <= cap
        weights = Bounded(np.ones(rows, LONG), np.zeros(rows, LONG))
        if case.views:
            scored = [oracle.statistics(self._teacher(view, 1.0), ids, unit)["logprobs"] for view in case.views]
            weights = oracle.agreement(
                np.stack([each.value for each in scored]),
                cu,
                options["agreement"],
                options["agreement_statistic"],
                options["agreement_gamma"],
                np.stack([each.error for each in scored]),
            )
        if case.token_weights is not None:
            given = case.token_weights.numpy().astype(LONG)
            weights = Bounded(weights.value * given, weights.error * given + 4 * unit * given)
        default = "count" if case.views and options["agreement"] == "sequence" else "weighted"
        weighted = (options["weight_normalization"] or default) == "weighted"
        items = options["num_items"]
        shares = oracle.token_shares(weights.value, cu, by_sequence, weighted, items)
        # A weight's error moves its own share and, through the sum of weights, all others.
        relative = (weights.error / np.maximum(weights.value, 1e-12)).max() if rows else LONG(0)
        d_shares = 2 * shares * relative
        plain = oracle.token_shares(np.ones(rows, LONG), cu, by_sequence, False, items)
        total = options["divergence_weight"] * (shares * kept).sum()
        error = options["divergence_weight"] * (shares * d.error + d_shares * np.abs(kept)).sum()
        size = options["divergence_weight"] * (shares * np.abs(kept)).sum()
        row_scale = options["divergence_weight"] * (shares * open_)[:, None]
        row_error = options["divergence_weight"] * (d_shares * open_)[:, None]
        gradient = d_gradient.value * row_scale
        d_of_gradient = d_gradient.error * row_scale + np.abs(d_gradient.value) * row_error
        self._share = row_scale * (1 + np.abs(d.value[:, None]))
        # Gradients are relative to the largest row coefficient (docs/design.md).
        coefficients = np.stack([options["divergence_weight"] * shares, options["contrastive_weight"] * plain])
        self._later = coefficients.max(initial=0.0)
        if case.negative is not None:
            ours = oracle.statistics(self.student, ids, unit)["logprobs"]
            theirs = oracle.statistics(teacher, ids, unit)["logprobs"]
            wrong = oracle.statistics(self._teacher(case.negative, case.temperature), ids, unit)["logprobs"]
            to_teacher, to_negative = ours.value - theirs.value, ours.value - wrong.value
            inside = options["contrastive_margin"] + np.abs(to_teacher) - np.abs(to_negative)
            blur = 2 * ours.error + theirs.error + wrong.error + 8 * unit
            kinks = np.stack([inside, to_teacher, to_negative])
            self.undecided |= bool((np.abs(kinks) <= SLACK * blur).any())
            active, weight = inside > 0, options["contrastive_weight"]
            total = total + weight * (plain * np.maximum(inside, 0)).sum()
            error = error + weight * (plain * blur).sum()
            size = size + weight * (plain * np.maximum(inside, 0)).sum()
            of_lp = oracle.logprob_gradient(self.student, ids)
            slope = weight * (plain * active * (np.sign(to_teacher) - np.sign(to_negative)))[:, None]
            gradient = gradient + of_lp.value * slope
            d_of_gradient = d_of_gradient + of_lp.error * np.abs(slope) + 8 * unit * np.abs(of_lp.value * slope)
            self._share = self._share + np.abs(slope)
        features = None
        if options["feature_weight"] > 0:
            student, other = self.hidden.astype(LONG), as_numpy(case.teacher).astype(LONG)  # type: ignore[union-attr]
            apart = student - other
            f = (apart**2).mean(1)
            total = total + options["feature_weight"] * (plain * f).sum()
            error = error + options["feature_weight"] * 16 * unit * (plain * f).sum()
            features = options["feature_weight"] * plain[:, None] * 2 * apart / max(student.shape[1], 1)
        self.values = {"loss": Bounded(np.asarray([total], LONG), np.asarray([error + 16 * unit * size], LONG))}
        return Bounded(gradient, d_of_gradient + 8 * unit * np.abs(gradient)), features


def run(case: Case, impl: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(values, gradients) by an implementation."""
    settings: dict[str, Any] = {"temperature": case.temperature, "impl": impl, "workspace_bytes": case.workspace}
    leaves = list(case.leaves.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unisd_loss got no rows")
        if case.operation == "loss":
            loss = unisd_loss(
                case.student,
                case.student_head,
                case.teacher,
                case.teacher_head,
                case.ids,
                case.cu,
                auxiliary_hidden=case.views or None,
                negative_hidden=case.negative,
                token_weights=case.token_weights,
                beta=case.beta,
                **case.options,
                **settings,
            ).loss
            values = {"loss": loss}
            total = loss
        elif case.operation == "logprobs":
            result = linear_logprobs(case.student, case.student_head, case.ids, return_entropy=True, **settings)
            values = dict(result._asdict())
            total = sum(
                (values[name] * up.to(values[name])).sum() for name, up in zip(values, case.upstream, strict=True)
            )
        else:
            divergence = linear_divergence(
                case.student, case.student_head, case.teacher, case.teacher_head, beta=case.beta, **settings
            )
            values = {"divergence": divergence}
            total = (divergence * case.upstream[0].to(divergence)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if each is None else each
        for (name, leaf), each in zip(case.leaves.items(), found, strict=True)
    }
    return {name: value.detach() for name, value in values.items()}, gradients


def shortfalls(case: Case, impl: str) -> list[str]:
    """Where an implementation is further from the oracle than rounding explains."""
    expected = Expectation(case)
    if expected.undecided:
        return []
    values, gradients = run(case, impl)
    is_stored = impl == "triton_fused" and 0.0 < case.beta < 1.0 and case.dtype in (torch.float16, torch.bfloat16)
    missed = []
    for kind, ours, exact, store in (
        ("", values, expected.values, ARITHMETIC[case.dtype]),
        ("gradient of ", gradients, expected.gradients, STORE[case.dtype]),
    ):
        for name, tensor in ours.items():
            right, mine = exact[name], np.atleast_1d(tensor.double().numpy().astype(LONG))
            allowed = SLACK * right.error + 2 * store * np.abs(right.value) + SMALLEST[case.dtype]
            if is_stored and not kind:
                allowed = allowed + SUMS_OF_STORED * np.abs(right.value)
            if mine.size:
                # Sums over rows and columns mix: one entry's bound is also the largest one's share.
                allowed = allowed + 2 * expected.unit * np.abs(right.value).max()
                over = np.abs(mine - right.value) - allowed
                over[~np.isfinite(mine)] = np.inf
                if (over > 0).any():
                    at = np.unravel_index(int(np.argmax(over)), over.shape)
                    missed.append(
                        f"{kind}{name}{list(map(int, at))}: {float(mine[at]):.9g}, exact {float(right.value[at]):.9g}, "
                        f"allowed {float(allowed[at]):.2g}"
                    )
    return missed
