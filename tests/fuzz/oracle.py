"""Every formula of the contract once more, in numpy, sharing no line with what it checks.

Not even the way: logits are one dense matrix in extended precision, gradients are written out by hand, nothing is
chunked, and no torch function is called. Beside each value stands how far rounding may move it: first-order bounds from
the error of each logit, so that a comparison asks of every implementation what float32 can give, and no more.

Shapes: hidden [N, H], weight [V, H], bias [V]; logits z [N, V]; everything else [N] or like its operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LONG = np.longdouble


@dataclass(frozen=True)
class Head:
    """`z = cap(scale (h W^T + b))`; only the first `columns` rows of the weight count."""

    weight: np.ndarray
    bias: np.ndarray | None
    scale: float
    cap: float | None
    columns: int


@dataclass(frozen=True)
class Logits:
    """z = head / temperature, the slope dz/dx of each logit by its raw product x = h W^T + b, and both roundings."""

    z: np.ndarray
    slope: np.ndarray
    error: np.ndarray
    slope_error: np.ndarray
    unit: float


@dataclass(frozen=True)
class Bounded:
    """A value and how far rounding may move it, of the same shape."""

    value: np.ndarray
    error: np.ndarray


def logits(hidden: np.ndarray, head: Head, temperature: float, unit: float) -> Logits:
    """unit: the rounding of the arithmetic, 2^-24 for float32."""
    hidden, weight = hidden.astype(LONG), head.weight[: head.columns].astype(LONG)
    bias = np.zeros(head.columns, LONG) if head.bias is None else head.bias[: head.columns].astype(LONG)
    raw = hidden @ weight.T + bias
    size = np.abs(hidden) @ np.abs(weight).T + np.abs(bias)
    # A sum of H terms; the blocked sums of real kernels do better than H / 2 roundings.
    raw_error = unit * (2 + min(hidden.shape[1] / 2, 16)) * size
    scaled, slope = head.scale * raw, np.full_like(raw, head.scale)
    if head.cap is not None:
        tanh = np.tanh(scaled / head.cap)
        scaled, slope = head.cap * tanh, slope * (1 - tanh * tanh)
    z = scaled / temperature
    slope = slope / temperature
    error = np.abs(slope) * raw_error + 4 * unit * np.abs(z)
    slope_error = np.zeros_like(z)
    if head.cap is not None:
        # 1 - tanh^2 keeps the rounding of tanh however small it is, and moves with the logit.
        slope_error = (
            abs(head.scale) / temperature * 2 * (2 * unit + np.abs(1 - tanh * tanh) * error * temperature / head.cap)
        )
    return Logits(z, slope, error, slope_error, unit)


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _row(values: np.ndarray) -> np.ndarray:
    return values.sum(1, keepdims=True)


def log_p_error(x: Logits) -> np.ndarray:
    """[N, V]: of each log-probability: its own logit's error, the mean one of the log-sum-exp, and those of log and
    exp."""
    p = np.exp(log_softmax(x.z))
    return x.error + _row(p * x.error) + 4 * x.unit


def statistics(x: Logits, ids: np.ndarray, unit: float) -> dict[str, Bounded]:
    """logp of the ids, log-sum-exp, entropy; each [N]."""
    lp = log_softmax(x.z)
    p = np.exp(lp)
    top = x.z.max(1)
    lse = top + np.log(np.exp(x.z - top[:, None]).sum(1))
    entropy = -(p * np.where(p > 0, lp, 0)).sum(1)
    picked = np.arange(len(ids)), ids
    d_lp = log_p_error(x)
    # d(entropy)/dz_j = -p_j (lp_j + entropy).
    d_entropy = (p * np.abs(lp + entropy[:, None]) * x.error).sum(1) + 8 * unit * (p * np.abs(lp)).sum(1)
    return {
        "logprobs": Bounded(lp[picked], d_lp[picked] + 8 * unit * (1 + np.abs(lp[picked]))),
        "logsumexp": Bounded(lse, (p * x.error).sum(1) + 8 * unit * (1 + np.abs(lse))),
        # lse - mean(z) is a difference of numbers as large as the logits.
        "entropy": Bounded(entropy, d_entropy + unit * (8 + np.abs(x.z).max(1))),
    }


def logprob_gradient(x: Logits, ids: np.ndarray) -> Bounded:
    """[N, V]: d logp(id) / dz."""
    p = np.exp(log_softmax(x.z))
    gradient = -p
    gradient[np.arange(len(ids)), ids] += 1
    return Bounded(gradient, p * log_p_error(x))


def entropy_gradient(x: Logits) -> Bounded:
    """[N, V]: d entropy / dz = -p (lp + entropy)."""
    lp = log_softmax(x.z)
    p = np.exp(lp)
    inner = lp - _row(p * lp)
    d_lp = log_p_error(x)
    return Bounded(-p * inner, p * (np.abs(inner) * d_lp + d_lp + _row(p * (np.abs(inner) + 1) * d_lp)))


def divergence(student: Logits, teacher: Logits, beta: float, unit: float) -> tuple[Bounded, Bounded]:
    """([N] D, [N, V] dD/dz_s)."""
    ls, lt = log_softmax(student.z), log_softmax(teacher.z)
    ps, pt = np.exp(ls), np.exp(lt)
    es, et = log_p_error(student), log_p_error(teacher)
    beta = LONG(beta)
    if beta == 0:
        ratio = lt - ls
        value = (pt * ratio).sum(1)
        gradient = ps - pt
        error = (np.abs(gradient) * student.error).sum(1) + (pt * np.abs(ratio - value[:, None]) * teacher.error).sum(1)
        d_gradient = ps * es + pt * et
        size = (pt * np.abs(ratio)).sum(1)
    elif beta == 1:
        ratio = ls - lt
        value = (ps * ratio).sum(1)
        inner = ratio - value[:, None]
        gradient = ps * inner
        error = (np.abs(gradient) * student.error).sum(1) + (np.abs(ps - pt) * teacher.error).sum(1)
        d_gradient = ps * (np.abs(inner) * es + es + et + _row(ps * ((np.abs(inner) + 1) * es + et)))
        size = (ps * np.abs(ratio)).sum(1)
    else:
        # log m without underflow of either side.
        lm = np.logaddexp(np.log1p(-beta) + ls, np.log(beta) + lt)
        em = np.exp(np.log1p(-beta) + ls - lm) * es + np.exp(np.log(beta) + lt - lm) * et
        student_side, teacher_side = ls - lm, lt - lm
        inner = student_side - _row(ps * student_side)
        value = beta * (pt * teacher_side).sum(1) + (1 - beta) * (ps * student_side).sum(1)
        gradient = (1 - beta) * ps * inner
        of_teacher = beta * pt * (teacher_side - _row(pt * teacher_side))
        error = (np.abs(gradient) * student.error + np.abs(of_teacher) * teacher.error).sum(1)
        d_gradient = (1 - beta) * ps * (np.abs(inner) * es + es + em + _row(ps * ((np.abs(inner) + 1) * es + em)))
        size = (beta * pt * np.abs(teacher_side) + (1 - beta) * ps * np.abs(student_side)).sum(1)
    # What a sum of terms of both signs keeps of their rounding, and the log-sum-exps', which is common to all terms.
    # One rounding of a log-sum-exp as large as the logits is granted too.
    largest = np.abs(student.z).max(1) + np.abs(teacher.z).max(1)
    error = error + unit * (8 + 8 * size + largest / 8)
    return Bounded(value, error), Bounded(gradient, d_gradient + 8 * unit * np.abs(gradient))


def pull_back(
    per_logit: Bounded, x: Logits, hidden: np.ndarray, head: Head, absolute: np.ndarray | float = 0.0
) -> dict[str, Bounded]:
    """Gradients of a sum over the rows: hidden [N, H], weight [V, H], bias [V], zero on the padding. `absolute`: how
    far off each entry of the gradient with respect to x may be whatever its size; a number or [N, 1]."""
    hidden, weight = hidden.astype(LONG), head.weight.astype(LONG)
    raw, error = per_logit.value * x.slope, per_logit.error * np.abs(x.slope)
    error = error + np.abs(per_logit.value) * x.slope_error + absolute
    padding = ((0, 0), (0, head.weight.shape[0] - head.columns))
    raw, error = np.pad(raw, padding), np.pad(error, padding)
    return {
        "hidden": Bounded(raw @ weight, error @ np.abs(weight)),
        "weight": Bounded(raw.T @ hidden, error.T @ np.abs(hidden)),
        "bias": Bounded(raw.sum(0), error.sum(0)),
    }


def agreement(lp: np.ndarray, cu: np.ndarray, level: str, statistic: str, gamma: float, error: np.ndarray) -> Bounded:
    """[N] weights from lp [K, N] (and their rounding errors, of the same shape)."""
    views, rows = lp.shape
    ones = np.ones(rows, LONG)
    if rows == 0 or views == 0:
        return Bounded(ones, 0 * ones)
    if level == "token":
        if views == 1:
            return Bounded(ones, 0 * ones)
        spread = lp.var(0, ddof=1) if statistic == "variance" else lp.max(0) - lp.min(0)
        wide = 4 * np.abs(lp - lp.mean(0)).max(0) + error.max(0) if statistic == "variance" else 2
        d_spread = wide * error.max(0)
        quantile = max(np.quantile(spread, LONG("0.95")), LONG(1e-6))
        x = spread / quantile
        d_x = d_spread / quantile + x * d_spread.max() / quantile
        weight = np.maximum(1 / (1 + gamma * np.minimum(x, 10)), 0.01)
        return Bounded(weight, gamma * weight**2 * d_x + 1e-6 * weight)
    weights, errors = ones.copy(), 0 * ones
    for start, end in pairwise(cu):
        if end == start:
            continue
        means, d_mean = lp[:, start:end].mean(1), error[:, start:end].mean(1).max()
        spread = means.var() if statistic == "variance" else means.max() - means.min()
        wide = 4 * np.abs(means - means.mean()).max() + d_mean if statistic == "variance" else 2
        weights[start:end] = max(np.exp(-gamma * spread), LONG(1e-6))
        errors[start:end] = weights[start] * (gamma * wide * d_mean + 1e-6)
    return Bounded(weights, errors)


def token_shares(
    weights: np.ndarray, cu: np.ndarray, by_sequence: bool, weighted: bool, items: float | None
) -> np.ndarray:
    """[N]: what each token's value is multiplied by in the reduced loss, its weight included."""
    rows, lengths = len(weights), np.diff(cu)
    shares = np.zeros(rows, LONG)
    if not by_sequence:
        # One sum by one count or one sum of weights; then this call's share of a larger batch.
        total = max(weights.sum(), LONG(1)) if weighted else LONG(max(rows, 1))
        return weights / total * (1 if items is None else LONG(rows) / LONG(items))
    for start, length in zip(cu[:-1], lengths, strict=True):
        if length:
            part = weights[start : start + length]
            total = max(part.sum(), LONG(1)) if weighted else LONG(length)
            shares[start : start + length] = part / total
    return shares / LONG(items if items is not None else len(lengths))
