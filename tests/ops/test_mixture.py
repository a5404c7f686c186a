"""`mix_hidden`: one hidden state with the distribution of the dense mixture, and what it refuses."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import assert_accurate, natives
from unisd_kernels import LMHead, linear_divergence, mix_hidden, reference, unisd_loss


def views_and_head(num_views, num_rows=5, width=8, columns=13, *, bias=True, seed=0, dtype=torch.float64, **head):
    """Views and their head in float64, of numbers that `dtype` holds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    views = [normal(num_rows, width) for _ in range(num_views)]
    return views, LMHead(normal(columns, width), normal(columns) if bias else None, **head)


def mixed_log_probs(views, weights, head, temperature=1.0):
    mixed = mix_hidden(views, weights, head)
    return reference.linear_logits(mixed, head, temperature).log_softmax(-1)


@settings(max_examples=40)
@given(
    num_views=st.integers(1, 9),
    num_rows=st.integers(0, 5),
    width=st.sampled_from([1, 3, 17]),
    columns=st.sampled_from([2, 13, 129]),
    kind=st.sampled_from(["consensus", "contrast", "any"]),
    bias=st.booleans(),
    vocab_size=st.sampled_from([None, 2]),
    logit_scale=st.sampled_from([1.0, 0.25, -1.5]),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    strided=st.booleans(),
    stacked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_dense_mixture(
    num_views, num_rows, width, columns, kind, bias, vocab_size, logit_scale, temperature, strided, stacked, seed
):
    options = {"bias": bias, "logit_scale": logit_scale, "vocab_size": vocab_size, "seed": seed}
    views, head = views_and_head(num_views, num_rows, width, columns, **options)
    weights = [1.0 / num_views] * num_views
    if kind != "consensus" and num_views > 1:
        weights = [1.5, -0.5, *[0.0] * (num_views - 2)]
    if kind == "any" and not bias:
        weights = torch.randn(num_views, generator=torch.Generator().manual_seed(seed)).tolist()  # of any sum
    if strided:
        views = [torch.stack([view, view + 1.0], dim=-1)[..., 0] for view in views]
    given_views = torch.stack(views) if stacked else views
    expected = reference.mixture_log_probs(views, weights, [head] * num_views, temperature)
    actual = mixed_log_probs(given_views, weights, head, temperature)
    assert actual.shape == (num_rows, head.num_columns)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_auxiliary", [0, 1, 3])
def test_as_the_teacher_of_a_loss(beta, num_auxiliary):
    """Loss and gradient are those of the divergence to the dense mixture; an empty sequence changes nothing."""
    (student, *views), head = views_and_head(num_auxiliary + 2)
    student.requires_grad_()
    weights = [1.0 / len(views)] * len(views)
    teacher = reference.mixture_log_probs(views, weights, [head] * len(views), 0.7)
    own = reference.linear_logits(student, head, 0.7).log_softmax(-1)
    divergence = reference.divergence_from_log_probs(own, teacher, beta)
    expected = (divergence[:2].mean() + divergence[2:].mean()) / 3
    (gradient,) = torch.autograd.grad(expected, student)
    ids, cu = torch.zeros(5, dtype=torch.long), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    mixed = mix_hidden(views, weights, head)
    result = unisd_loss(student, head, mixed, head, ids, cu, beta=beta, temperature=0.7)
    torch.testing.assert_close(result.divergence, divergence.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(result.loss, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(result.loss, student)[0], gradient, rtol=1e-10, atol=1e-12)


def test_the_reverse_kl_to_a_consensus_is_the_mean_of_those_to_its_views():
    """In its gradient; the forward KL is not: its mean is that to the arithmetic mean."""
    (student, *views), head = views_and_head(4)
    student.requires_grad_()
    mixed = mix_hidden(views, [1 / 3] * 3, head)

    def gradient(divergences):
        return torch.autograd.grad(torch.stack(divergences).mean(0).sum(), student)[0]

    for beta, is_mean in ((1.0, True), (0.0, False)):
        each = gradient([linear_divergence(student, head, view, head, beta=beta) for view in views])
        one = gradient([linear_divergence(student, head, mixed, head, beta=beta)])
        assert torch.allclose(one, each, rtol=1e-11, atol=1e-12) == is_mean


def test_the_example_of_the_page_runs():
    text = (Path(__file__).parents[2] / "docs" / "mixtures.md").read_text()
    (student, teacher, *auxiliary), head = views_and_head(4)
    names = {"student": student.requires_grad_(), "teacher": teacher, "auxiliary": auxiliary, "head": head}
    names |= {"ids": torch.zeros(5, dtype=torch.long), "cu": torch.tensor([0, 5], dtype=torch.int32)}
    exec(text[text.index("```python\n") + 10 : text.index("```\n", text.index("```python\n") + 10)], names)
    names["result"].loss.backward()
    assert student.grad.abs().min() > 0


def test_a_view_alone_is_itself():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        view = torch.randn(3, 4, dtype=dtype)
        assert torch.equal(mix_hidden([view], [1.0]), view)


def test_gradients():
    views = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *v: mix_hidden(v, [0.5, 1.0, -0.5]), views)
    assert torch.autograd.gradgradcheck(lambda *v: mix_hidden(v, [0.5, 1.0, -0.5]), views)
    narrow = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(mix_hidden([narrow, narrow.detach()], [1.5, -0.5]).sum(), narrow)
    assert torch.equal(gradient, torch.full_like(narrow, 1.5))
    frozen = narrow.detach().clone()
    mix_hidden([narrow.detach(), frozen], [1.5, -0.5])
    assert torch.equal(frozen, narrow), "the views are read only"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [[0.25] * 4, [1.5, -0.5], [3.0, -2.0]])
def test_the_rounding_keeps_the_error_rule(dtype, weights):
    """The hidden state is rounded once: no worse than each view's logits in the dtype, mixed in float32."""
    views, head = views_and_head(len(weights), 16, 64, 257, bias=False, dtype=dtype)
    exact = reference.mixture_log_probs(views, weights, [head] * len(weights))
    narrow, narrow_head = [view.to(dtype) for view in views], LMHead(head.weight.to(dtype))
    native = natives(lambda: reference.mixture_log_probs(narrow, weights, [narrow_head] * len(weights)))
    ours = mixed_log_probs(narrow, weights, narrow_head)
    assert_accurate("log p", ours, exact, native)


def test_the_sum_is_rounded_once():
    """Beside a large view, small ones add up before the rounding, in bfloat16 one by one to nothing."""
    views = [torch.full((1, 1), value, dtype=torch.bfloat16) for value in (256.0, 0.5, 0.5, 0.5, 0.5)]
    mixed = mix_hidden([*views, views[0]], [1.0] * 5 + [0.0], LMHead(torch.ones(2, 1, dtype=torch.bfloat16)))
    assert list(accumulate(views))[-1].item() == 256.0
    assert mixed.item() == 258.0


def test_weights_of_another_sum_and_a_bias_are_refused_and_the_advice_is_right():
    views, head = views_and_head(2)
    expected = reference.mixture_log_probs(views, [1.0, 2.0], [head, head])
    with pytest.raises(ValueError, match=r"add up to 3, not 1.*divide the weights by their sum.*logit_scale=3"):
        mix_hidden(views, [1.0, 2.0], head)
    scaled = LMHead(head.weight, head.bias, logit_scale=3.0)
    torch.testing.assert_close(mixed_log_probs(views, [1 / 3, 2 / 3], scaled), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"add up to 0, not 1.*leave the bias out"):
        mix_hidden(views, [1.0, -1.0], head)
    bare = LMHead(head.weight)
    expected = reference.mixture_log_probs(views, [1.0, -1.0], [head, head])
    torch.testing.assert_close(mixed_log_probs(views, [1.0, -1.0], bare), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"add up to 1\.5, not 1.*give head="):
        mix_hidden(views, [1.0, 0.5])
    mix_hidden([view.float() for view in views], [np.float32(0.1)] * 1 + [np.float32(0.9)])  # 1 but for rounding


def test_one_head_is_one_in_memory():
    views, head = views_and_head(2)
    trained = LMHead(head.weight.requires_grad_(), head.bias, vocab_size=13)
    assert head.is_same(trained.detach()), "all of its columns, by number"
    mix_hidden(views, [0.5, 0.5], [head, trained.detach()])
    other_bias = LMHead(head.weight, head.bias.clone())
    for other in (
        LMHead(head.weight),
        other_bias,
        LMHead(head.weight.clone(), head.bias),
        LMHead(head.weight, head.bias, 2.0),
    ):
        assert not head.is_same(other)
        with pytest.raises(ValueError, match=r"head\[1\] is another head than head\[0\]"):
            mix_hidden(views, [0.5, 0.5], [head, other])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"views": []}, ValueError, "views is empty"),
        ({"views": torch.zeros(5, 8)}, ValueError, r"one \[K, N, H\], got one of shape \(5, 8\)"),
        ({"views": 3}, TypeError, "got int"),
        ({"views": [torch.zeros(5, 8), None]}, TypeError, r"views\[1\] must be a torch.Tensor \[N, H\], got NoneType"),
        ({"views": [torch.zeros(5, 8), torch.zeros(4, 8)]}, ValueError, r"views\[1\] has the shape \(4, 8\) but"),
        (
            {"views": [torch.zeros(5, 8), torch.zeros(5, 8).half()]},
            ValueError,
            "has the dtype torch.float16",
        ),
        ({"views": [torch.zeros(2, 5, 8)] * 2}, ValueError, r"views\[0\] must be a dense tensor \[N, H\]"),
        ({"views": [torch.zeros(5, 8, dtype=torch.long)] * 2}, TypeError, "floating-point tensor, got torch.int64"),
        ({"weights": [1.0]}, ValueError, "got 1 weights for 2 views"),
        ({"weights": [1.0, float("nan")]}, ValueError, r"weights\[1\] must be finite, got nan"),
        ({"weights": [1.0, True]}, TypeError, r"weights\[1\] must be a number, got bool"),
        ({"weights": torch.ones(2)}, TypeError, r"got Tensor; take .tolist\(\) of it"),
        ({"head": LMHead(torch.zeros(13, 8), softcap=30.0)}, ValueError, "has the soft cap 30: capped logits are not"),
        ({"head": LMHead(torch.zeros(13, 9))}, ValueError, "hidden size 8 but head expects 9"),
        ({"head": [LMHead(torch.zeros(13, 8))]}, ValueError, "got 1 heads for 2 views"),
        ({"head": torch.zeros(13, 8)}, TypeError, "must be an LMHead, got Tensor"),
    ],
)
def test_mistakes_are_refused(change, error, message):
    arguments = {"views": [torch.zeros(5, 8)] * 2, "weights": [0.5, 0.5], "head": LMHead(torch.zeros(13, 8)), **change}
    with pytest.raises(error, match=message):
        mix_hidden(**arguments)


def test_divergence_to_a_mixture_of_near_views_keeps_its_digits():
    """In bfloat16 the mixture is rounded, so D is that of the rounded state; with the views as they are in float32 the
    C++ backend's difference form still holds D's digits."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, 64, generator=generator)
    views = [student + 1e-3 * torch.randn(8, 64, generator=generator) for _ in range(3)]
    head = LMHead(torch.randn(257, 64, generator=generator) * 0.3)
    wide = LMHead(head.weight.double())
    own = reference.linear_logits(student.double(), wide).log_softmax(-1)
    mixture = reference.mixture_log_probs([view.double() for view in views], [1 / 3] * 3, [wide] * 3)
    exact = reference.divergence_from_log_probs(own, mixture, 0.0)
    assert float(exact.max()) < 1e-4
    ours = linear_divergence(student, head, mix_hidden(views, [1 / 3] * 3, head), head)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0.0)
