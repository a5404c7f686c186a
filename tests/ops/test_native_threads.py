"""The CPU kernels give the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ops.native_tiles import needs_library
from tests.support import make_problem
from unisd_kernels import unisd_loss
from unisd_kernels.backends import extension
from unisd_kernels.backends.native import _NUM_STATISTICS

pytestmark = needs_library

THREADS = (1, 2, 8)


def sweep(first, *others):
    """Values of a parameter: the first for `make test`, the others for `make test-all`."""
    return [first, *(pytest.param(value, marks=pytest.mark.exhaustive) for value in others)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def assert_same_bits(compute: Callable[[], list[torch.Tensor]]) -> None:
    """`compute` starts from the same numbers at every call. Three times each: which thread takes what is a race."""
    torch.set_num_threads(THREADS[0])
    expected = compute()
    assert expected
    assert all(tensor.numel() and tensor.double().abs().max() > 0 for tensor in expected)
    for threads in THREADS[1:]:
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        for _ in range(3):
            for position, (ours, right) in enumerate(zip(compute(), expected, strict=True)):
                assert torch.equal(bits(ours), bits(right)), f"result {position} with {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", sweep((50, 33, 9001), (7, 130, 2049), (145, 200, 700), (1, 97, 5000)))
def test_products(shape, dtype):
    rows, width, columns = shape
    ops = extension.operations()
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(columns, width) / width**0.5).to(dtype)
    bias, ids = torch.randn(columns), torch.randint(0, columns, (rows,))
    gradient = torch.randn(rows, columns)

    def compute() -> list[torch.Tensor]:
        logits, scores = torch.empty(rows, columns), [torch.empty(rows) for _ in range(6)]
        back = torch.empty(rows, width)
        ops.linear_logits(hidden, weight, bias, 0.7, logits)
        ops.linear_score(hidden, weight, bias, 0.7, None, ids, *scores[:3])
        ops.linear_score(hidden, weight, None, 0.7, 5.0, ids, *scores[3:])
        ops.linear_backward(gradient, weight, 0.7, back)
        weight_gradient = torch.ones(columns, width)
        ops.linear_weight_gradient(gradient, hidden, 0.7, True, weight_gradient)
        return [logits, *scores, back, weight_gradient]

    assert_same_bits(compute)


def test_streamed_logits():
    hidden, weight = torch.randn(130, 5), torch.randn(9000, 5)

    def compute() -> list[torch.Tensor]:
        out = torch.empty(130, 9008)[:, :9000]
        extension.operations().linear_logits(hidden, weight, None, 1.0, out)
        return [out]

    assert_same_bits(compute)


@pytest.mark.parametrize("beta", sweep(0.3, 0.0, 1.0))
@pytest.mark.parametrize("kind", ["plain", "cap", "delta"])
def test_tiles(kind, beta):
    ops = extension.operations()
    rows, columns = 37, 3001
    student, teacher = torch.randn(rows, columns), torch.randn(rows, columns)
    ids, weight = torch.randint(0, columns, (rows,)), torch.randn(rows)
    cap = 4.0 if kind == "cap" else None

    def compute() -> list[torch.Tensor]:
        s, t, statistics = student.clone(), teacher.clone(), torch.empty(_NUM_STATISTICS, rows)
        # Every other row one of differences.
        teacher_is_delta = torch.arange(s.shape[0]) % 2 == 0 if kind == "delta" else None
        ops.tile_divergence_(s, t, cap, cap, teacher_is_delta, ids, beta, True, statistics)
        ops.tile_divergence_gradient_(s, t, cap, teacher_is_delta, ids, beta, statistics, weight, weight)
        soft, lse, logits = student.clone(), torch.empty(rows), torch.empty(rows)
        ops.tile_softmax_(soft, cap, ids, lse, logits)
        gradient = student.clone()
        ops.tile_logprob_gradient_(gradient, cap, lse, ids, weight, weight, lse - logits, weight)
        narrow = torch.empty(rows, columns, dtype=torch.bfloat16)
        ops.scale_rows(student, weight, narrow)
        return [s, t, statistics, soft, lse, logits, gradient, narrow]

    assert_same_bits(compute)


@pytest.mark.parametrize("mode", ["stochastic", "compensation"])
@pytest.mark.parametrize("dtype", sweep(torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_moving_average(dtype, mode):
    sizes = (3, 70000, 1, 200001)
    teacher = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    student = [torch.randn(size) for size in sizes]
    compensation = [torch.randn(size).mul_(1e-3).to(dtype) for size in sizes]

    def compute() -> list[torch.Tensor]:
        t, c = [[tensor.clone() for tensor in tensors] for tensors in (teacher, compensation)]
        extension.operations().ema_update_(
            t, student, 0.99, [] if mode == "stochastic" else c, mode == "stochastic", 1234567
        )
        return t if mode == "stochastic" else [*t, *c]

    assert_same_bits(compute)


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("softcap", sweep(None, 8.0))
@pytest.mark.parametrize("beta", sweep(0.5, 0.0))
def test_loss_and_its_gradient(beta, softcap, shared_head):
    """With a trainable head too."""
    problem = make_problem(
        lengths=(40, 0, 131, 20),
        hidden_size=65,
        vocab_size=2500,
        softcap=softcap,
        shared_head=shared_head,
        frozen_head=shared_head,
        bias=True,
    ).to(torch.float32)

    def compute() -> list[torch.Tensor]:
        # Many chunks.
        result = unisd_loss(**problem.arguments(), beta=beta, impl="native", workspace_bytes=1 << 20)
        gradients = torch.autograd.grad(result.loss, problem.leaves)
        return [
            result.loss,
            result.divergence,
            result.student_logprobs,
            result.teacher_logprobs,
            *gradients,
        ]

    assert_same_bits(compute)
