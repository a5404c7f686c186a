"""bfloat16 operands multiplied as they are, where the processor does: against float64, and beside the dense formulas in
bfloat16. tests/build/kernels checks the products of every set that this processor has."""

from __future__ import annotations

import pytest
import torch

from tests.ops.native_tiles import needs_library
from tests.support import assert_accurate, max_error
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, reference
from unisd_kernels.backends import extension

pytestmark = [
    needs_library,
    pytest.mark.skipif(
        extension.cpu_unavailable() is not None or not extension.cpu_multiplies_bfloat16(),
        reason="this processor has no instruction for bfloat16 products, or UNISD_CPU_ISA names another set",
    ),
]

WIDTHS = [2, 30, 32, 34, 62, 64, 66, 256, 258, 576]


def operands(rows: int, width: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width + columns)
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    return hidden, (torch.randn(columns, width, generator=generator) * (2.0 / width**0.5)).bfloat16()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 15, 17, 49, 97])
def test_products_lose_no_more_than_a_float32_sum(rows, width):
    """Whole steps of 16 pairs, tiles of 16 or 32 rows, and what is left of each; odd counts of columns."""
    hidden, weight = operands(rows, width, 131)
    out, exact = torch.empty(rows, 131), hidden.double() @ weight.double().T
    extension.operations().linear_logits(hidden, weight, None, 1.0, out)
    assert_accurate("logits", out, exact, hidden.float() @ weight.float().T)
    gradient = torch.randn(rows, 131).bfloat16()
    back, exact = torch.empty(rows, width), gradient.double() @ weight.double()
    extension.operations().linear_backward(gradient.float(), weight, 1.0, back)
    assert_accurate("hidden gradient", back, exact, gradient.float() @ weight.float())


def test_rows_and_columns_of_a_larger_matrix():
    """Strides that are odd, so that a row begins in the middle of a pair, and what lies around is NaN."""
    hidden, weight = (torch.full((n, 67), torch.nan).bfloat16() for n in (33, 90))
    hidden[:, 1:65], weight[:, 2:66] = (part for part in operands(33, 64, 90))
    hidden, weight = hidden[:, 1:65], weight[:, 2:66]
    out, back = torch.empty(33, 90), torch.empty(33, 64)
    extension.operations().linear_logits(hidden, weight, None, 1.0, out)
    assert_accurate("logits", out, hidden.double() @ weight.double().T, hidden.float() @ weight.float().T)
    gradient = out.bfloat16().float()
    extension.operations().linear_backward(gradient, weight, 1.0, back)
    assert_accurate("gradient", back, gradient.double() @ weight.double(), gradient @ weight.float())


def test_the_gradient_is_rounded_once():
    """To bfloat16, on its way into the product: half a unit of the last of 8 bits, to nearest."""
    _, weight = operands(1, 64, 500)
    gradient, back = torch.randn(20, 500), torch.empty(20, 64)
    extension.operations().linear_backward(gradient, weight, 1.0, back)
    rounded = gradient.bfloat16()
    assert_accurate("gradient", back, rounded.double() @ weight.double(), rounded.float() @ weight.float())


def both_divergences(hidden, teacher, head, beta):
    """(D, gradient) of ours, of float64 and of the dense formulas whose products are bfloat16's."""
    results = []
    for function, dtype in ((linear_divergence, torch.bfloat16), (reference.linear_divergence, torch.float64)):
        leaf, wide = hidden.detach().to(dtype, copy=True).requires_grad_(), LMHead(head.weight.to(dtype))
        divergence = function(leaf, wide, teacher.to(dtype), wide, beta=beta)
        divergence.sum().backward()
        results.append((divergence.detach(), leaf.grad))
    leaf = hidden.clone().requires_grad_()
    logits = [(h @ head.weight.T).float().log_softmax(-1) for h in (leaf, teacher)]
    forward = (logits[1].exp() * (logits[1] - logits[0])).sum(-1)
    divergence = forward if beta == 0.0 else (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    divergence.sum().backward()
    results.append((divergence.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 0.02, 0.1, 1.0])
def test_a_divergence_keeps_its_digits(distance, beta):
    """However near the teacher is, D is right to 1e-3 of itself, where dense bfloat16 formulas have no digit left."""
    hidden, weight = operands(40, 128, 1000)
    noise = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    teacher = (hidden.float() + distance * noise).bfloat16()
    ours, exact, dense = both_divergences(hidden, teacher, LMHead(weight), beta)
    assert ((ours[0] - exact[0]).abs() <= 1e-3 * exact[0] + 1e-12).all()
    assert_accurate("gradient", ours[1], exact[1], dense[1])
    if distance <= 1e-2:
        assert max_error(dense[0], exact[0]) > 10 * max_error(ours[0], exact[0])


def test_an_odd_width_is_widened():
    hidden, weight = operands(20, 33, 300)
    ids = torch.arange(20)
    ours = linear_logprobs(hidden, LMHead(weight), ids)[0]
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[ids, ids]
    assert max_error(ours, exact) < 1e-5
