"""A whole step of the loss on the Triton path: products counted, memory bounded, nothing read back to the host."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import make_problem
from tests.triton.support import DEVICE, NARROW, examples, on_device
from unisd_kernels import unisd_loss
from unisd_kernels.backends.base import NeedsGrad
from unisd_kernels.backends.engine import Engine
from unisd_kernels.backends.triton import chunked_divergence, fused_divergence, gradients, rows, score, statistics
from unisd_kernels.backends.triton.backend import TritonBackend
from unisd_kernels.config import LossConfig
from unisd_kernels.ops.loss_autograd import loss_and_gradients

# What makes the host wait for the device: a value read, or a shape that depends on values.
_WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


class NoWaiting(TorchDispatchMode):
    """Refuses operations that would wait for a device, wherever they run; remembers the largest tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in _WAITING, f"{name} reads from the device"
        if name == "_to_copy":
            target = (kwargs or {}).get("device")
            assert target is None or target.type == DEVICE.type, "a tensor leaves the device"
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out


class Launches:
    """Stands in for a kernel, so that the interpreter's own copies are not taken for the loss's."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.grids.append(grid)
            with torch.utils._python_dispatch._disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Every kernel of the backend, watched, by name."""
    watched = {}
    for module in (score, fused_divergence, chunked_divergence, gradients, rows, statistics):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            watched[name] = Launches(getattr(module, name))
            monkeypatch.setattr(module, name, watched[name])
    return watched


CLIPS = [{}, {"clip_cap": 0.5}, {"clip_quantile": 0.7}]


@pytest.mark.parametrize(
    ("design", "beta", "clip"),
    examples(
        product(["fused", "chunked"], [0.0, 0.5], CLIPS),
        [("fused", 0.0, CLIPS[2]), ("chunked", 0.5, CLIPS[2])],
    ),
)
def test_nothing_is_read_back(launches, monkeypatch, design, beta, clip):
    # Values are read and checked on a CPU; elsewhere this is an assertion on the device.
    monkeypatch.setattr("unisd_kernels.ops.agreement.check_cu_seqlens", lambda *_: None)
    problem = on_device(make_problem(lengths=(4, 0, 6), hidden_size=16, vocab_size=67, shared_head=True)).to(NARROW)
    spec = LossConfig(beta=beta, feature_weight=0.1, temperature=0.7, **clip)
    with NoWaiting():
        result, gradients, _ = loss_and_gradients(
            problem, spec, NeedsGrad(True, True), Engine(TritonBackend(design), 1 << 20)
        )
    assert torch.isfinite(result.loss)
    assert gradients.hidden is not None
    assert gradients.hidden.any()
    ours = "fused_divergence_kernel" if design == "fused" and beta == 0.0 else "block_statistics_kernel"
    assert launches[ours].grids


@pytest.mark.parametrize(("num_auxiliary", "scorings"), [(3, 2), (0, 1)])
def test_products(launches, num_auxiliary, scorings):
    """One scoring for all auxiliary views of a small batch, one for the negative, one product for student and teacher;
    the gradient's is a library product."""
    problem = on_device(
        make_problem(
            lengths=(20,),
            hidden_size=16,
            vocab_size=67,
            num_auxiliary=num_auxiliary,
            shared_head=True,
            frozen_head=True,
        )
    ).to(NARROW)
    unisd_loss(**problem.arguments(), impl="triton").loss.backward()
    assert len(launches["score_kernel"].grids) == scorings
    assert len(launches["fused_divergence_kernel"].grids) == 1
    assert len(launches["divergence_gradient_kernel"].grids) == 1
    assert not launches["block_statistics_kernel"].grids


@pytest.mark.parametrize("design", ["fused", "chunked"])
def test_no_tensor_is_larger_than_the_workspace(launches, design):
    problem = on_device(
        make_problem(lengths=(24,), hidden_size=8, vocab_size=131, num_auxiliary=0, shared_head=True, frozen_head=True)
    ).to(NARROW)
    workspace = 6 << 10
    with NoWaiting() as mode:
        loss_and_gradients(problem, LossConfig(), NeedsGrad(True), Engine(TritonBackend(design), workspace))
    assert mode.largest <= workspace < 2 * 24 * 131


def test_a_tiny_workspace_is_refused():
    problem = on_device(make_problem(vocab_size=67, shared_head=True)).to(NARROW)
    with pytest.raises(ValueError, match="workspace_bytes=100 is too small"):
        unisd_loss(**problem.arguments(), impl="triton", workspace_bytes=100)


@pytest.mark.parametrize("beta", [0.0, pytest.param(0.5, marks=pytest.mark.exhaustive)])
def test_compiled_without_a_graph_break(beta):
    """Under torch.compile the loss is one operator, whose kernels run as in eager mode."""
    problem = on_device(
        make_problem(lengths=(9, 12), hidden_size=16, vocab_size=67, shared_head=True, frozen_head=True)
    ).to(NARROW)

    def loss(hidden):
        arguments = {**problem.arguments(), "student_hidden": hidden}
        return unisd_loss(**arguments, beta=beta, impl="triton").loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden = problem.student_hidden.detach().requires_grad_()
        value = function(hidden)
        results.append((value.detach(), *torch.autograd.grad(value, hidden)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_autocast_is_the_narrow_dtype(launches):
    """Operands are rounded as those of a linear layer would be, and nothing inside is rounded more."""
    problem = on_device(make_problem(lengths=(9, 12), hidden_size=16, vocab_size=67, shared_head=True)).to(
        torch.float32
    )
    with torch.autocast(DEVICE.type, NARROW):
        wide = unisd_loss(**problem.arguments(), impl="triton").loss
    # One head for both is still one after the casts.
    assert launches["fused_divergence_kernel"].grids
    narrow = unisd_loss(**problem.to(NARROW).arguments(), impl="triton").loss
    torch.testing.assert_close(wide.detach(), narrow.detach(), rtol=1e-5, atol=1e-6)
    (gradient, *_) = torch.autograd.grad(wide, problem.leaves)
    assert gradient.dtype == torch.float32
    assert gradient.abs().max() > 0
