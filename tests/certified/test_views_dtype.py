"""`unisd_loss(views_dtype="int8")`: weights within the tolerance, all else as without, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.certified.problems import views_problem
from unisd_kernels import LMHead, unisd_loss
from unisd_kernels.backends import extension
from unisd_kernels.certified import int8_head
from unisd_kernels.config import LossConfig, LossInputs
from unisd_kernels.ops.loss_compiled import loss_compiled

# A case for the widths and vocabularies of `views_problem`, of logits that matter.
SIZES = {"num_rows": 60, "width": 24, "columns": 150, "size": 3.0, "apart": 0.3}
needs_kernel = pytest.mark.skipif(
    extension.cpu_unavailable() is not None or not extension.cpu_multiplies_int8(),
    reason="the processor has no product of int8 codes, or the compiled library is absent",
)


@pytest.fixture(autouse=True)
def _nothing_ready(monkeypatch):
    monkeypatch.setattr(int8_head, "_ready", [])


def loss(problem, head=None, **settings):
    head = LMHead(problem.head.weight, problem.head.bias) if head is None else head
    student = (problem.views[0] + 0.1).requires_grad_()
    options = {"agreement_gamma": 1.0, "auxiliary_hidden": problem.views, **settings}
    result = unisd_loss(student, head, problem.views[0], head, problem.target_ids, problem.cu_seqlens, **options)
    result.loss.backward()
    return result, student.grad


def problem_of(seed=2, dtype=torch.float32, **sizes):
    return views_problem(seed, **{**SIZES, **sizes}).to(dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("agreement", "statistic"), [("token", "variance"), ("token", "range"), ("sequence", "range")])
def test_weights_are_within_the_tolerance(dtype, agreement, statistic):
    problem = problem_of(dtype=dtype)
    settings = {"agreement": agreement, "agreement_statistic": statistic}
    exact, _ = loss(problem, **settings)
    for tolerance in (0.1, 1e-3, 0.0):
        found, gradient = loss(problem, views_dtype="int8", views_tolerance=tolerance, **settings)
        # float32 itself is a little off.
        assert float((found.weights - exact.weights).abs().max()) <= tolerance + 1e-5
        assert torch.equal(found.student_logprobs, exact.student_logprobs)
        assert torch.equal(found.divergence, exact.divergence)
        assert bool(gradient.isfinite().all())
    torch.testing.assert_close(found.auxiliary_logprobs, exact.auxiliary_logprobs, rtol=0.05, atol=0.5)
    torch.testing.assert_close(found.loss, exact.loss)


@needs_kernel
def test_int8_scores_are_what_is_used():
    exact, _ = loss(problem_of())
    found, _ = loss(problem_of(), views_dtype="int8", views_tolerance=1.0)
    apart = (found.auxiliary_logprobs - exact.auxiliary_logprobs).abs()
    assert 0 < float(apart.max()) < 0.5


@needs_kernel
def test_a_head_that_changes_in_place_is_prepared_again():
    problem = problem_of()
    head = LMHead(problem.head.weight.clone())
    for _ in range(3):
        exact, _ = loss(problem, head)
        found, _ = loss(problem, head, views_dtype="int8", views_tolerance=0.01)
        assert float((found.weights - exact.weights).abs().max()) <= 0.01 + 1e-5
        assert len(int8_head._ready) == 1 or len(int8_head._ready) == 2
        with torch.no_grad():
            head.weight.mul_(-0.7)


@needs_kernel
def test_the_operator_of_compiled_graphs():
    problem = problem_of()
    config = LossConfig(agreement_gamma=1.0, views_dtype="int8", views_tolerance=0.05)
    assert LossConfig.decode(config.encode()) == config
    eager, _ = loss(problem, views_dtype="int8", views_tolerance=0.05)

    def operator(head):
        views, ids = problem.views, (problem.target_ids, problem.cu_seqlens)
        inputs = LossInputs(views[0] + 0.1, head, views[0], head, *ids, auxiliary_hidden=views)
        return loss_compiled(inputs, config, None, None)

    assert torch.equal(operator(LMHead(problem.head.weight, problem.head.bias)).weights, eager.weights)
    with pytest.raises(ValueError, match="frozen head"):
        operator(LMHead(problem.head.weight.clone().requires_grad_()))


@needs_kernel
def test_no_rows():
    problem = problem_of()
    nothing = problem._replace(
        views=tuple(view[:0] for view in problem.views),
        target_ids=problem.target_ids[:0],
        cu_seqlens=torch.tensor([0, 0]),
    )
    for agreement in ("token", "sequence"):
        with pytest.warns(UserWarning, match="no rows"):
            exact, _ = loss(nothing, agreement=agreement)
        with pytest.warns(UserWarning, match="no rows"):
            found, _ = loss(nothing, agreement=agreement, views_dtype="int8", views_tolerance=0.05)
        for name in ("loss", "weights", "auxiliary_logprobs", "disagreement"):
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), msg=name)


@needs_kernel
def test_a_row_that_is_not_finite_is_scored_exactly():
    problem = problem_of()
    problem.views[1][3, 2] = torch.nan
    with pytest.warns(UserWarning, match="auxiliary_hidden"):
        found, _ = loss(problem, views_dtype="int8", views_tolerance=0.05, agreement="sequence")
    assert found.auxiliary_logprobs.isnan().nonzero().tolist() == [[1, 3]]


@needs_kernel
def test_what_is_refused():
    problem = problem_of()
    settings = {"views_dtype": "int8", "views_tolerance": 0.05}
    with pytest.raises(ValueError, match="needs the C\\+\\+ backend on a CPU, got impl 'torch'"):
        loss(problem, impl="torch", **settings)
    with pytest.raises(ValueError, match="got impl 'reference'"):
        loss(problem, impl="reference", **settings)
    with pytest.raises(ValueError, match="got impl 'torch'"):
        loss(problem.to(torch.float64), **settings)
    with pytest.raises(ValueError, match="frozen head"):
        loss(problem, LMHead(problem.head.weight.clone().requires_grad_()), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views_dtype": "fp8", "views_tolerance": 0.1}, "views_dtype must be one of 'int8'"),
        ({"views_dtype": "int8"}, "go together"),
        ({"views_tolerance": 0.1}, "go together"),
        ({"views_dtype": "int8", "views_tolerance": -0.1}, "views_tolerance must be >= 0"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        loss(problem_of(), **settings)


@pytest.mark.exhaustive
@pytest.mark.skipif(extension.cpu_unavailable() is not None, reason="the compiled library is absent")
def test_a_processor_without_the_instruction():
    root = Path(__file__).parents[2]
    code = (
        "from tests.certified.test_views_dtype import loss, problem_of\n"
        "loss(problem_of(), views_dtype='int8', views_tolerance=0.1)\n"
    )
    environment = os.environ | {"UNISD_CPU_ISA": "scalar", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert "needs a processor with AVX512_VNNI, got 'scalar'" in done.stderr
