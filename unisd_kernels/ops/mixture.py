"""`mix_hidden`: a log-linear mixture of several views of the same tokens, as one hidden state."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch

from unisd_kernels.dtypes import statistics_dtype
from unisd_kernels.heads import LMHead
from unisd_kernels.validation import check_head, check_hidden, check_operand_dtype


def mix_hidden(
    views: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[float],
    head: LMHead | Sequence[LMHead] | None = None,
) -> torch.Tensor:
    """The hidden state whose distribution is the normalized product of those of K views, each to the power of a weight.

        h = sum_k a_k h_k        softmax(W h + b) = prod_k p_k^{a_k} / Z        where sum_k a_k = 1

    With one head that is linear in h (no soft cap), `sum_k a_k log p_k = sum_k a_k (W h_k + b) + const`, so the mixture
    costs a loss one view's product whatever K: give the result as `teacher_hidden` to `unisd_loss` or
    `linear_divergence`, with the views' own head. Any scale of the head and any temperature may follow, since both only
    multiply the logits: the mixture of tempered views is the tempered mixture.

    Weights of another sum s make `W h + s b` of the mixture: without a bias the result is right as it is. With one it
    is refused, since no hidden state holds s b: mix with `a_k / s` instead and multiply the head's `logit_scale` by s
    (leave out its bias for s = 0), which is the same distribution.

    Args:
        views: K >= 1 tensors [N, H] of the same tokens (or one [K, N, H]), of one dtype: float32, float64, bfloat16 or
            float16. Any strides.
        weights: K finite numbers, negative ones too (`h_t + alpha (h_t - h_n)` has 1 + alpha and -alpha).
        head: the views' head, or one for each view, which must be one: the same memory, scale, cap and columns. None
            leaves that, and that there is no soft cap, to the caller; then the weights must add up to 1.

    Returns:
        [N, H] in the views' dtype. The sum is taken in float32 (float64 for float64) and rounded once, as every hidden
        state of a model is: see docs/mixtures.md for what that costs in 16 bits. float16 overflows above 65504.

    The gradient with respect to view k is a_k times the result's, in the view's dtype; nothing is saved for backward.

    Raises:
        ValueError, TypeError: no view, views of different shapes, dtypes or devices, not one weight a view, a weight
            that is not finite, different heads, a soft cap, weights that do not add up to 1 where the head has a bias
            or is not given. The message says what was got.

    Source: docs/mixtures.md. With two views contrastive decoding (arXiv 2309.09117) and context-aware decoding (arXiv
    2305.14739).
    """
    tensors = _checked_views(views)
    factors = _checked_weights(weights, len(tensors))
    _check_heads(head, tensors)
    dtype = statistics_dtype(tensors[0].dtype)
    _check_sum(factors, head[0] if isinstance(head, Sequence) else head, dtype)
    mixed = tensors[0].to(dtype) * factors[0]
    for view, weight in zip(tensors[1:], factors[1:], strict=True):
        mixed = mixed.add_(view, alpha=weight)
    return mixed.to(tensors[0].dtype)


def _checked_views(views: object) -> list[torch.Tensor]:
    """The views, one tensor each."""
    if isinstance(views, torch.Tensor):
        if views.dim() != 3:
            raise ValueError(f"views must be K tensors [N, H] or one [K, N, H], got one of shape {tuple(views.shape)}")
        views = list(views.unbind(0))
    if not isinstance(views, Sequence):
        raise TypeError(f"views must be K tensors [N, H] or one [K, N, H], got {type(views).__name__}")
    tensors = list(views)
    if not tensors:
        raise ValueError("views is empty: a mixture needs at least one view")
    for k, view in enumerate(tensors):
        if not isinstance(view, torch.Tensor):
            raise TypeError(f"views[{k}] must be a torch.Tensor [N, H], got {type(view).__name__}")
        if view.layout != torch.strided or view.dim() != 2:
            shape = f"layout {view.layout}" if view.layout != torch.strided else f"shape {tuple(view.shape)}"
            raise ValueError(f"views[{k}] must be a dense tensor [N, H] (packed valid rows), got {shape}")
        check_operand_dtype(f"views[{k}]", view)
        for what in ("shape", "dtype", "device"):
            own, first = getattr(view, what), getattr(tensors[0], what)
            if own != first:
                raise ValueError(
                    f"views[{k}] has the {what} {_shown(own)} but views[0] has {_shown(first)}; every view must be of "
                    "the same packed tokens, in one dtype"
                )
    return tensors


def _shown(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _checked_weights(weights: object, num_views: int) -> list[float]:
    """The weights as Python's own numbers."""
    if isinstance(weights, torch.Tensor) or not isinstance(weights, Sequence):
        hint = "; take .tolist() of it" if hasattr(weights, "tolist") else ""
        raise TypeError(f"weights must be a list of numbers, one a view, got {type(weights).__name__}{hint}")
    if len(weights) != num_views:
        raise ValueError(f"got {len(weights)} weights for {num_views} views; give one a view")
    for k, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"weights[{k}] must be a number, got {type(weight).__name__}")
        if not math.isfinite(weight):
            raise ValueError(f"weights[{k}] must be finite, got {weight}")
    return [float(weight) for weight in weights]


def _check_heads(head: LMHead | Sequence[LMHead] | None, views: list[torch.Tensor]) -> None:
    """Raise unless all views have one head without a soft cap."""
    if head is None:
        return
    heads = list(head) if isinstance(head, Sequence) else [head] * len(views)
    if len(heads) != len(views):
        raise ValueError(f"got {len(heads)} heads for {len(views)} views; give the one head, or one a view")
    for k, (view, own) in enumerate(zip(views, heads, strict=True)):
        name = "head" if isinstance(head, LMHead) else f"head[{k}]"
        check_head(name, own)
        if not heads[0].is_same(own):
            raise ValueError(
                f"{name} is another head than head[0] (other memory, scale, cap or columns): views of different heads "
                "have no common hidden state; score them under one head, or mix their log-probabilities"
            )
        if own.softcap is not None:
            raise ValueError(
                f"{name} has the soft cap {own.softcap:g}: capped logits are not linear in the hidden state, so no "
                "hidden state is the mixture; mix log-probabilities instead"
            )
        check_hidden(f"views[{k}]", view, own, name)


def _check_sum(weights: list[float], head: LMHead | None, dtype: torch.dtype) -> None:
    """Raise where another sum than 1 is, or may be, wrong. What counts as 1: the rounding of K numbers."""
    total = math.fsum(weights)
    if abs(total - 1.0) <= 4.0 * torch.finfo(dtype).eps * math.fsum(map(abs, weights)):
        return
    if head is None:
        raise ValueError(
            f"the weights add up to {total:g}, not 1, which only a head without a bias allows: give head=..., or "
            "divide them by their sum and multiply the head's logit_scale by it"
        )
    if head.active_bias is not None:
        instead = (
            "leave the bias out of the mixture's head (LMHead(weight, None, ...))"
            if total == 0.0
            else f"divide the weights by their sum and give the mixture's head logit_scale={head.logit_scale * total:g}"
        )
        raise ValueError(
            f"the weights add up to {total:g}, not 1, so that the mixture's bias is {total:g} times the head's, which "
            f"no hidden state holds: {instead}"
        )
