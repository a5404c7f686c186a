"""`unisd_loss` against the float64 reference: all mechanisms at once, corners, and what it must not spend."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import CLIP_OPTIONS, LOSS_OPTIONS, assert_accurate, make_problem, natives, problems
from unisd_kernels import UniSDLoss, unisd_loss

SMALL = 8192
FLOATS = [name for name in UniSDLoss._fields if name not in ("loss", "clipped")]


def run(problem, options, impl, **extra):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unisd_loss got no rows")
        result = unisd_loss(**problem.arguments(), **options, impl=impl, **extra)
    return result, torch.autograd.grad(result.loss, problem.leaves)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(data=st.data())
def test_all_mechanisms_at_once(dtype, data):
    check_all_mechanisms(dtype, data)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=300)
@given(data=st.data())
def test_all_mechanisms_many_times(dtype, data):
    check_all_mechanisms(dtype, data)


def check_all_mechanisms(dtype, data):
    exact_problem = data.draw(problems(dtype=dtype))
    # In 16 bits the native projection may put a token on the other side of a threshold, so clipping by a quantile or
    # a cap is compared where both compute the same numbers.
    clips = CLIP_OPTIONS if dtype in (torch.float64, torch.float32) else st.just({})
    options = {**data.draw(LOSS_OPTIONS), **data.draw(clips)}
    exact, exact_gradients = run(exact_problem, options, "reference")
    problem = exact_problem.to(dtype)
    ours, gradients = run(problem, options, None, workspace_bytes=SMALL)
    native = natives(lambda: run(problem, options, "reference"))
    for name in ("loss", *FLOATS):
        mine, right = getattr(ours, name), getattr(exact, name)
        assert (mine is None) == (right is None), name
        if mine is not None:
            # The hinge is a difference of log-probabilities and keeps their rounding, however small it is.
            of = exact.student_logprobs if name.startswith("contrastive") else None
            plain = [getattr(result, name).detach() for result, _ in native]
            assert_accurate(name, mine.detach(), right.detach(), plain, difference_of=of)
    for position, (mine, right) in enumerate(zip(gradients, exact_gradients, strict=True)):
        assert_accurate(f"gradient {position}", mine, right, [each[position] for _, each in native])


@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("clip", ["cap", "quantile", "largest"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_clipping(beta, clip, negative, frozen_head):
    problem = make_problem(lengths=(5, 0, 6), negative=negative, frozen_head=frozen_head, bias=True)
    divergence = run(problem, {"beta": beta}, "reference")[0].divergence.sort().values
    # Between two tokens and far from both, so that no rounding decides who is clipped; a quantile of an odd number of
    # tokens is one of them, by whatever implementation, and equal to itself.
    assert divergence[6] - divergence[5] > 1e-3
    options = {
        "cap": {"clip_cap": float(divergence[5:7].mean())},
        "quantile": {"clip_quantile": 0.5},
        "largest": {"clip_quantile": 1.0},
    }[clip]
    options["beta"] = beta
    exact, exact_gradients = run(problem, options, "reference")
    ours, gradients = run(problem, options, None, workspace_bytes=SMALL)
    assert ours.clipped.tolist() == exact.clipped.tolist()
    assert int(ours.clipped.sum()) == (0 if clip == "largest" else 5)
    torch.testing.assert_close(ours.loss, exact.loss)
    for a, b in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_gradient_accumulation_equals_the_big_batch(normalization):
    problem = make_problem(lengths=(3, 4, 2, 5), num_auxiliary=0)
    items = 4 if normalization == "sequence" else 14
    options = {"normalization": normalization, "feature_weight": 0.2, "contrastive_margin": 2.0}
    whole, expected = run(problem, options, None)
    total = [torch.zeros_like(leaf) for leaf in problem.leaves]
    loss = 0.0
    for start, end, cu in ((0, 7, [0, 3, 7]), (7, 14, [0, 2, 7])):
        part = unisd_loss(
            problem.student_hidden[start:end],
            problem.student_head,
            problem.teacher_hidden[start:end],
            problem.teacher_head,
            problem.target_ids[start:end],
            torch.tensor(cu),
            negative_hidden=problem.negative_hidden[start:end],
            num_items=items,
            **options,
        )
        loss += float(part.loss.detach())
        for accumulated, gradient in zip(total, torch.autograd.grad(part.loss, problem.leaves), strict=True):
            accumulated += gradient
    assert loss == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    for a, b in zip(total, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("lengths", [(0,), (0, 0), ()])
def test_all_masked_batch(impl, lengths):
    problem = make_problem(lengths=lengths, frozen_head=False).to(torch.float32)
    with pytest.warns(UserWarning, match="no rows"):
        result = unisd_loss(
            **problem.arguments(), clip_quantile=0.5, feature_weight=0.1, impl=impl, normalization="sequence"
        )
    gradients = torch.autograd.grad(result.loss, problem.leaves, allow_unused=impl == "reference")
    assert float(result.loss.detach()) == 0.0
    for gradient in gradients:
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("impl", ["reference", None])
def test_an_empty_sequence_contributes_zero(impl):
    with_empty = make_problem(lengths=(3, 0, 5), num_auxiliary=0)
    without = make_problem(lengths=(3, 5), num_auxiliary=0)
    a, _ = run(with_empty, {}, impl)
    b, _ = run(without, {}, impl)
    torch.testing.assert_close(a.loss * 3, b.loss * 2)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_finite_at_zero_divergence_and_extreme_logits(beta):
    problem = make_problem(shared_head=True, frozen_head=True).to(torch.float32)
    problem.student_head.weight[3] = 1e4
    problem.student_head.weight[7] = -1e4
    options = {"beta": beta, "feature_weight": 0.1, "contrastive_margin": 1.0}
    result, gradients = run(problem, options, None)
    assert result.loss.isfinite()
    assert gradients[0].isfinite().all()
    same = {"teacher_hidden": problem.student_hidden.detach().clone(), "teacher_head": problem.student_head}
    problem = replace(problem, **same, negative_hidden=None)
    result, gradients = run(problem, {"beta": beta}, None)
    assert abs(float(result.loss.detach())) < 1e-6
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("where", ["student_hidden", "teacher_hidden", "negative_hidden"])
def test_nan_inputs_give_a_nan_loss_and_one_warning_that_names_them(where, impl):
    problem = make_problem(frozen_head=True).to(torch.float32)
    tensor = getattr(problem, where).detach()
    tensor[2, 1] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = unisd_loss(**problem.arguments(), impl=impl)
    ours = [str(w.message) for w in caught if "unisd_loss" in str(w.message)]
    assert result.loss.isnan()
    assert len(ours) == 1
    assert where in ours[0]


def test_upstream_scale_and_retained_graph():
    problem = make_problem(frozen_head=False)
    result = unisd_loss(**problem.arguments())
    once = torch.autograd.grad(result.loss, problem.leaves, retain_graph=True)
    scaled = torch.autograd.grad(result.loss * -3.0, problem.leaves)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(a * -3.0, b)


def test_float16_gradients_survive_a_large_batch():
    """1 / (number of tokens) alone would push a float16 gradient tile towards its subnormals."""
    problem = make_problem(dtype=torch.float16, frozen_head=False).to(torch.float16)
    big, small = {"num_items": 3e6}, {"num_items": 3.0}
    _, tiny = run(problem.to(torch.float32), big, None)
    _, normal = run(problem.to(torch.float32), small, None)
    for a, b in zip(tiny, normal, strict=True):
        torch.testing.assert_close(a * 1e6, b, rtol=1e-4, atol=1e-6)


def test_auxiliary_views_as_one_tensor_or_many():
    problem = make_problem()
    arguments = problem.arguments()
    a = unisd_loss(**arguments)
    arguments["auxiliary_hidden"] = torch.stack(problem.auxiliary_hidden)
    assert torch.equal(a.loss, unisd_loss(**arguments).loss)


def test_separate_heads_for_auxiliary_and_negative():
    problem = make_problem()
    other = make_problem(seed=9).teacher_head
    for name in ("auxiliary_head", "negative_head"):
        a, b = (unisd_loss(**problem.arguments(), **{name: other}, impl=impl) for impl in ("reference", None))
        torch.testing.assert_close(a.loss, b.loss)
        assert not torch.equal(a.loss, unisd_loss(**problem.arguments()).loss)


def test_only_the_loss_is_differentiable():
    result = unisd_loss(**make_problem().arguments(), feature_weight=0.1)
    for name, value in result._asdict().items():
        assert value is None or value.requires_grad == (name == "loss"), name


def test_gradient_only_where_required():
    problem = make_problem(bias=True, frozen_head=True)
    problem.student_head.bias.requires_grad_()
    problem = replace(problem, student_hidden=problem.student_hidden.detach())
    a, b = (run(problem, {}, impl)[1][0] for impl in ("reference", None))
    torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not unisd_loss(**problem.arguments()).loss.requires_grad


@pytest.mark.parametrize("impl", ["reference", None])
def test_autocast_rounds_the_operands_and_nothing_else(impl):
    problem = make_problem(hidden_size=17).to(torch.float32)
    options = {"feature_weight": 0.3, "contrastive_margin": 2.0}
    with torch.autocast("cpu", torch.bfloat16):
        ours = unisd_loss(**problem.arguments(), **options, impl=impl)
    # Outside, as PyTorch asks for: inside, autocast would round the products of the reference's backward.
    gradients = torch.autograd.grad(ours.loss, problem.leaves)
    expected, narrow_gradients = run(problem.to(torch.bfloat16), options, impl)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.divergence, expected.divergence, rtol=1e-6, atol=1e-7)
    for ours_gradient, narrow in zip(gradients, narrow_gradients, strict=True):
        torch.testing.assert_close(ours_gradient, narrow.float())


@pytest.mark.parametrize("lengths", [(), (0, 0), (9, 0, 12)])
@pytest.mark.parametrize("features_only", [False, True])
def test_nothing_depends_on_what_memory_held_before(lengths, features_only):
    """Gradients start in memory that nothing has cleared; with poisoned memory the same numbers come out."""
    options = {"divergence_weight": 0.0, "feature_weight": 1.0, "contrastive_weight": 0.0} if features_only else {}
    p = make_problem(lengths=lengths or (0,), hidden_size=8, vocab_size=67, bias=True).to(torch.float32)

    def gradients():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = unisd_loss(**p.arguments(), workspace_bytes=4 << 10, **options).loss
        return torch.autograd.grad(loss, p.leaves)

    expected = gradients()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        poisoned = gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, plain in zip(poisoned, expected, strict=True):
        torch.testing.assert_close(ours, plain)
        assert ours.isfinite().all()
