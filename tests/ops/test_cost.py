"""The two promises of the design: no [N, V] tensor, and the minimum number of matrix products."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import make_problem
from unisd_kernels import linear_divergence, linear_logprobs, mix_hidden, unisd_loss
from unisd_kernels.backends import buffers

N, H, V = 96, 8, 509
WORKSPACE = 64 << 10  # 16 rows of two float32 [V] buffers


class Meter(TorchDispatchMode):
    """Counts multiply-adds of matrix products and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.multiply_adds = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
        elif name in ("linear_score", "linear_logits", "linear_backward"):
            self.multiply_adds += args[0].shape[0] * args[1].numel()
        elif name == "linear_weight_gradient":
            self.multiply_adds += args[0].numel() * args[1].shape[1]
        elif name in ("matmul", "bmm", "linear"):
            raise AssertionError(f"{name} is not counted")
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def problem(**options):
    return make_problem(lengths=(40, 0, 56), hidden_size=H, vocab_size=V, **options).to(torch.float32)


def measure(function, leaves):
    with Meter() as meter:
        out = function()
        if leaves:
            torch.autograd.grad(out, leaves)
    return meter.multiply_adds / (N * H * V), meter.largest


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("frozen_head", "num_auxiliary", "negative", "options", "products"),
    [
        (True, 3, True, {}, 7),  # K + 4
        (True, 3, True, {"clip_cap": 0.5, "feature_weight": 0.1}, 7),
        (True, 0, False, {}, 3),
        (True, 0, False, {"clip_quantile": 0.9}, 3),
        (True, 0, True, {}, 4),
        (True, 0, False, {"divergence_weight": 0.0, "feature_weight": 1.0}, 2),  # statistics only
        (False, 0, False, {"divergence_weight": 0.0, "feature_weight": 1.0, "clip_quantile": 0.9}, 2),
        # Terms of weight 0 whose statistics nobody wants: the agreement belongs to the divergence.
        *(
            (frozen, 3, True, {"return_statistics": False, **weights}, products)
            for frozen, extra in ((True, 0), (False, 1))
            for weights, products in (
                ({"divergence_weight": 0.0, "contrastive_weight": 0.0, "feature_weight": 1.0}, 0),
                ({"contrastive_weight": 0.0, "feature_weight": 1.0}, 6 + extra),
                ({"divergence_weight": 0.0}, 4 + extra),
                ({}, 7 + extra),
            )
        ),
        (False, 0, False, {}, 4),
        (False, 3, True, {"clip_cap": 0.5}, 8),
        (False, 0, False, {"clip_quantile": 0.9}, 6),  # documented: the cap is needed before dW is summed
    ],
)
def test_unisd_loss(frozen_head, num_auxiliary, negative, options, products, beta):
    p = problem(frozen_head=frozen_head, num_auxiliary=num_auxiliary, negative=negative)
    count, largest = measure(
        lambda: unisd_loss(**p.arguments(), beta=beta, workspace_bytes=WORKSPACE, **options).loss, p.leaves
    )
    assert count == products
    assert 4 * largest <= WORKSPACE < 4 * N * V / 2


@pytest.mark.parametrize("num_auxiliary", [0, 1, 3, 8])
@pytest.mark.parametrize(("frozen_head", "products"), [(True, 3), (False, 4)])
def test_a_mixture_of_teachers_costs_one(frozen_head, products, num_auxiliary):
    p = problem(frozen_head=frozen_head, num_auxiliary=num_auxiliary, negative=False)

    def function():
        views = [p.teacher_hidden, *p.auxiliary_hidden]
        mixed = mix_hidden(views, [1.0 / len(views)] * len(views), p.teacher_head)
        arguments = {**p.arguments(), "teacher_hidden": mixed, "auxiliary_hidden": ()}
        return unisd_loss(**arguments, workspace_bytes=WORKSPACE).loss

    count, largest = measure(function, p.leaves)
    assert count == products
    assert 4 * largest <= WORKSPACE


@pytest.mark.parametrize(("frozen_head", "products"), [(True, 3), (False, 6)])
def test_linear_divergence(frozen_head, products):
    p = problem(frozen_head=frozen_head)
    count, largest = measure(
        lambda: linear_divergence(
            p.student_hidden, p.student_head, p.teacher_hidden, p.teacher_head, workspace_bytes=WORKSPACE
        ).sum(),
        p.leaves,
    )
    assert count == products
    assert 4 * largest <= WORKSPACE < 4 * N * V / 2


@pytest.mark.parametrize(
    ("gradient", "frozen_head", "entropy", "products"),
    [(False, True, True, 1), (True, True, False, 2), (True, True, True, 3), (True, False, False, 4)],
)
def test_linear_logprobs(gradient, frozen_head, entropy, products):
    p = problem(frozen_head=frozen_head)

    def function():
        with torch.set_grad_enabled(gradient):
            return linear_logprobs(
                p.student_hidden, p.student_head, p.target_ids, return_entropy=entropy, workspace_bytes=WORKSPACE
            ).logprobs.sum()

    count, largest = measure(function, p.leaves if gradient else [])
    assert count == products
    assert 4 * largest <= WORKSPACE < 4 * N * V / 2


def test_a_frozen_head_costs_no_weight_gradient():
    p = problem(frozen_head=True)
    unisd_loss(**p.arguments(), workspace_bytes=WORKSPACE).loss.backward()
    assert p.student_head.weight.grad is None


@pytest.mark.parametrize("keeps_graph", [False, True])
def test_the_last_backward_makes_no_second_weight_gradient(keeps_graph):
    """A weight's gradient is scaled where it lies, unless the graph may be asked for it again."""
    p, made = problem(frozen_head=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: made.append(x.data_ptr()) or x, lambda x: x):
        loss = unisd_loss(**p.arguments(), workspace_bytes=WORKSPACE).loss
    (gradient,) = torch.autograd.grad(loss * 3.0, [p.student_head.weight], retain_graph=keeps_graph)
    assert (gradient.data_ptr() in made) == (not keeps_graph)


def test_no_gradient_no_backward_product():
    p = problem(frozen_head=True, num_auxiliary=0, negative=False)
    with torch.no_grad():
        count, _ = measure(lambda: unisd_loss(**p.arguments(), workspace_bytes=WORKSPACE).loss, [])
    assert count == 2


def test_a_tiny_workspace_is_refused():
    p = problem()
    with pytest.raises(ValueError, match="workspace_bytes=100 is too small"):
        unisd_loss(**p.arguments(), workspace_bytes=100)


@pytest.mark.parametrize(
    ("total", "step"), [(1, 5), (5, 5), (12, 5), (896, 384), (8192, 896), (1000, 256), (128, 256), (0, 3)]
)
def test_spans_cover_every_row_once(total, step):
    spans = list(buffers.spans(total, step))
    assert [row for span in spans for row in range(span.start, span.stop)] == list(range(total))
    assert len(spans) == -(-total // step)
    assert all(span.stop - span.start <= step for span in spans)


def test_whole_tiles_are_spread_evenly():
    sizes = [span.stop - span.start for span in buffers.spans(8192, 896)]
    assert set(sizes) == {896, 768}
    assert [span.stop - span.start for span in buffers.spans(896, 384)] == [384, 256, 256]
