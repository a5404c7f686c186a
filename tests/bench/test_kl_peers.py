"""Peers that have the mean of D only: its value, its gradients, and what they are refused for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from bench.cases import CASES, Case
from bench.inputs.sets import make_inputs
from bench.peers import liger_kl, orda
from bench.peers.step import Outcome, leaves
from bench.records.failures import NotHere, NotOffered
from unisd_kernels import LMHead, reference
from unisd_kernels.config import LossInputs

CPU = torch.device("cpu")
# The interpreter multiplies what Liger's kernel masks afterwards: 0 * inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")

CASE_NAMES = ("smoke.kl", "smoke.kl_trainable")


def expected_of(case: Case, inputs: LossInputs, beta: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """In float64: the mean of D, and its gradients of student and, where it is trained, head."""
    weight = inputs.student_head.weight.detach().double().requires_grad_()
    student = inputs.student_hidden.detach().double().requires_grad_()
    teacher_head = LMHead(weight.detach())
    divergence = reference.linear_divergence(
        student, LMHead(weight), inputs.teacher_hidden.double(), teacher_head, beta, case.options["temperature"]
    )
    mean = divergence.mean()
    wanted = (student,) if case.frozen_head else (student, weight)
    return mean.detach(), list(torch.autograd.grad(mean, wanted))


def run(
    module: ModuleType, case: Case, inputs: LossInputs, beta: float, monkeypatch
) -> tuple[Outcome, list[torch.Tensor]]:
    """The outcome of one step, and all the gradients that its backward made."""
    made: list[torch.Tensor] = []
    grad = torch.autograd.grad

    def watched(outputs, asked, *rest):
        assert [id(leaf) for leaf in asked] == [id(leaf) for leaf in leaves(inputs)]
        made.extend(grad(outputs, asked, *rest))
        return tuple(made)

    with monkeypatch.context() as patch:
        step = module.build(case, beta, CPU)
        patch.setattr(torch.autograd, "grad", watched)
        outcome = step(inputs)
    return outcome, made


def check(module: ModuleType, name: str, beta: float, monkeypatch) -> None:
    """On two inputs of one case: nothing of the first may be left in the step."""
    case = CASES[name]
    for seed in (0, 1):
        inputs = make_inputs(case, CPU, seed)
        mean, expected = expected_of(case, inputs, beta)
        outcome, gradients = run(module, case, inputs, beta, monkeypatch)
        torch.testing.assert_close(outcome.value.double(), mean, rtol=1e-5, atol=0)
        torch.testing.assert_close(outcome.gradient, gradients[0], rtol=0, atol=0)
        assert len(gradients) == len(expected)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.fixture
def interpreter():
    """Liger's kernels run on the CPU where they were imported for the interpreter."""
    pytest.importorskip("liger_kernel")
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")


@pytest.mark.parametrize("case", CASE_NAMES)
def test_liger_is_the_mean(case, monkeypatch, interpreter):
    check(liger_kl, case, 0.0, monkeypatch)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_liger_has_forward_kl_only(beta):
    with pytest.raises(NotOffered, match="forward KL only"):
        liger_kl.build(CASES["smoke.kl"], beta, CPU)


def test_liger_needs_a_gpu_without_the_interpreter(monkeypatch):
    pytest.importorskip("liger_kernel")
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(NotHere, match="needs a GPU"):
        liger_kl.build(CASES["smoke.kl"], 0.0, CPU)


@pytest.mark.parametrize("case", CASE_NAMES)
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_orda_is_the_mean(case, beta, monkeypatch):
    pytest.importorskip("orda_kernel")
    check(orda, case, beta, monkeypatch)


def test_orda_never_falls_back(monkeypatch):
    """On a GPU its kernels are asked for by name, with the options of the CPU's backend, which are checked above."""
    orda_kernel = pytest.importorskip("orda_kernel")
    asked = []

    def distillation_loss(student_hidden, weight, labels, teacher, **options):
        asked.append(options)
        return orda_kernel.DistillationLossOutput(*(student_hidden.sum() for _ in range(4)))

    stand_in = ModuleType("orda_kernel")
    stand_in.KernelConfig, stand_in.TiedTeacher = orda_kernel.KernelConfig, orda_kernel.TiedTeacher
    stand_in.distillation_loss = distillation_loss
    monkeypatch.setitem(sys.modules, "orda_kernel", stand_in)
    case = CASES["smoke.kl"]
    inputs = make_inputs(case, CPU)
    for device in ("cpu", "cuda"):
        orda.build(case, 0.0, torch.device(device))(inputs)
    on_cpu, on_gpu = asked
    assert (on_cpu.pop("backend"), on_gpu.pop("backend")) == ("torch", "triton")
    assert on_cpu == on_gpu


@pytest.mark.parametrize("case", CASE_NAMES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_orda_has_a_kernel_for_what_is_asked(case, beta):
    """Its planner accepts the options for its kernels, which is checked before the device is."""
    pytest.importorskip("orda_kernel")
    step = orda.build(CASES[case], beta, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="requires Triton and CUDA"):
        step(make_inputs(CASES[case], CPU))
