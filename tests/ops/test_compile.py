"""`unisd_loss` inside `torch.compile`: one operator, no graph break, the numbers of the eager call."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import unisd_loss
from unisd_kernels.ops import loss_compiled
from unisd_kernels.results import UniSDLoss


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compare(problem, **options):
    """Every field of the result, and all gradients, of a graph without breaks and of the eager call."""

    def step(hidden, arguments):
        result = unisd_loss(**{**arguments, "student_hidden": hidden * 1.5}, **options)
        return tuple(result), result.loss * 3.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outcomes = []
    for function in (step, compiled):
        fields, loss = function(problem.student_hidden, problem.arguments())
        outcomes.append((fields, torch.autograd.grad(loss, problem.leaves)))
    (eager, eager_gradients), (ours, gradients) = outcomes
    for name, expected, found in zip(UniSDLoss._fields, eager, ours, strict=True):
        assert (expected is None) == (found is None), name
        if expected is not None:
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=name)
            assert found.requires_grad == (name == "loss")
    for expected, found in zip(eager_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        ({"frozen_head": True}, {"clip_cap": 0.5, "feature_weight": 0.1}),
        ({"frozen_head": False, "bias": True}, {"beta": 0.5, "normalization": "token"}),
        (
            {"frozen_head": False, "num_auxiliary": 0, "negative": False},
            {"clip_quantile": 0.9, "return_entropy": False},
        ),
        ({"frozen_head": True, "softcap": 3.0, "logit_scale": 0.5}, {"agreement": "sequence", "num_items": 7}),
        ({"frozen_head": True, "lengths": (0, 0)}, {}),
        (
            {"frozen_head": False},
            {
                "return_statistics": False,
                "divergence_weight": 0.0,
                "contrastive_weight": 0.0,
                "feature_weight": 1.0,
            },
        ),
        ({"frozen_head": True}, {"return_statistics": False, "divergence_weight": 0.0}),
        ({"frozen_head": True}, {"return_statistics": False, "contrastive_weight": 0.0, "return_entropy": False}),
    ],
)
def test_no_graph_break_and_the_same_numbers(make, options):
    compare(make_problem(**make).to(torch.float32), **options)


def test_the_number_of_items_may_be_a_tensor():
    compare(make_problem(frozen_head=True).to(torch.float32), num_items=torch.tensor(5))


def test_another_number_of_rows_does_not_compile_anew():
    counts = []

    def backend(graph, example_inputs):
        counts.append(1)
        return graph.forward

    compiled = torch.compile(
        lambda **arguments: unisd_loss(**arguments).loss, backend=backend, dynamic=True, fullgraph=True
    )
    for lengths in ((4, 5), (7, 9), (11, 2)):
        arguments = make_problem(frozen_head=True, lengths=lengths).to(torch.float32).arguments()
        torch.testing.assert_close(compiled(**arguments), unisd_loss(**arguments).loss)
    assert len(counts) == 1


def test_bad_values_are_refused_when_the_graph_runs():
    problem = make_problem(frozen_head=True).to(torch.float32)
    arguments = problem.arguments()
    arguments["target_ids"] = arguments["target_ids"] + 10**6
    compiled = torch.compile(lambda: unisd_loss(**arguments).loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="target_ids must lie in"):
        compiled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": True}, "num_items must be a number, got bool"),
        pytest.param({"num_items": "3"}, "num_items must be a number, got str", marks=pytest.mark.exhaustive),
        ({"num_items": torch.tensor(-2)}, "num_items must be > 0, got -2"),
        pytest.param(
            {"num_items": torch.tensor([3.0])}, r"0-dim tensor, got shape \(1,\)", marks=pytest.mark.exhaustive
        ),
        ({"token_weights": torch.full((8,), -1.0)}, "token_weights must be >= 0, got values down to -1"),
        ({"token_weights": torch.ones(8, requires_grad=True)}, "token_weights must not require a gradient"),
    ],
)
def test_bad_arguments_do_not_slip_through(change, message):
    arguments = make_problem(frozen_head=True).to(torch.float32).arguments()
    compiled = torch.compile(lambda: unisd_loss(**{**arguments, **change}).loss, backend="aot_eager")
    with pytest.raises(Exception, match=message):
        compiled()


@pytest.mark.parametrize("frozen_head", [True, False])
def test_the_operator_is_registered_as_it_should_be(frozen_head):
    problem = make_problem(frozen_head=frozen_head, bias=True).to(torch.float32)
    calls = []
    with (
        mock.patch("torch.compiler.is_compiling", return_value=True),
        mock.patch.object(loss_compiled, "_loss_operator", _recording(calls)),
    ):
        unisd_loss(**problem.arguments(), feature_weight=0.1)
    (arguments,) = calls
    torch.library.opcheck(torch.ops.unisd.loss.default, arguments)


def _recording(calls):
    operator = loss_compiled._loss_operator

    def record(*arguments):
        calls.append(arguments)
        return operator(*arguments)

    return record
