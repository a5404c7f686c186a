"""The Triton kernels on a CUDA device at sizes that use their real tiles: accuracy in bfloat16, no races, CUDA graphs,
torch.compile, memory. The small shapes are in tests/triton.

Run by `scripts/gpu_suite.sh`; skipped without a GPU.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.support import make_problem
from unisd_kernels import LMHead, linear_divergence, linear_logprobs, unisd_loss
from unisd_kernels.backends import engine

pytestmark = pytest.mark.gpu

DESIGNS = ["triton_fused", "triton_chunked"]


def operands(rows: int, width: int, columns: int, dtype: torch.dtype, step: float = 0.3, heads: int = 1):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    student = normal(rows, width)
    teacher = (student + normal(rows, width, scale=step)).to(dtype)
    weights = [normal(columns, width, scale=3.0 / width**0.5) for _ in range(heads)]
    target_ids = torch.randint(0, columns, (rows,), generator=generator, device="cuda")
    return student, teacher, [LMHead(weight) for weight in weights], target_ids


def wide(head: LMHead) -> LMHead:
    return LMHead(head.weight.double())


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "columns"), [(700, 512, 32003), (64, 1024, 50257), (3, 576, 49152)])
def test_scores(dtype, rows, width, columns):
    """Real tiles with rows, columns and width that fill none of them; 50257 columns are no multiple of 16."""
    student, _, (head,), target_ids = operands(rows, width, columns, dtype)
    ours = linear_logprobs(student, head, target_ids, return_entropy=True)
    exact = linear_logprobs(student.double(), wide(head), target_ids, return_entropy=True, impl="reference")
    for name in ("logprobs", "logsumexp", "entropy"):
        assert relative(getattr(ours, name), getattr(exact, name)) < 1e-5, name


@pytest.mark.parametrize("impl", DESIGNS)
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize(
    ("rows", "width", "columns", "heads"), [(700, 512, 32003, 1), (300, 513, 20000, 1), (300, 512, 20000, 2)]
)
def test_divergence(impl, beta, rows, width, columns, heads):
    student, teacher, given, _ = operands(rows, width, columns, torch.bfloat16, heads=heads)
    weights = torch.linspace(0.0, 1.0, rows, device="cuda")

    def both(student, teacher, given, name):
        leaf = student.detach().requires_grad_()
        d = linear_divergence(leaf, given[0], teacher, given[-1], beta=beta, impl=name, workspace_bytes=64 << 20)
        return d.detach(), torch.autograd.grad((d * weights.to(d.dtype)).sum(), leaf)[0]

    exact = both(student.double(), teacher.double(), [wide(head) for head in given], "reference")
    ours = both(student, teacher, given, impl)
    assert relative(ours[0], exact[0]) < 1e-4
    # The gradient of the logits is rounded to bfloat16 before its product.
    assert relative(ours[1], exact[1]) < 5e-3


@pytest.mark.parametrize("impl", DESIGNS)
def test_the_weight_gradient(impl):
    student, teacher, (head,), target_ids = operands(700, 256, 9001, torch.bfloat16)
    offsets = torch.tensor([0, 300, 700], dtype=torch.int32, device="cuda")

    def gradients(student, teacher, weight, name):
        student, weight = student.detach().requires_grad_(), weight.detach().requires_grad_()
        result = unisd_loss(
            student,
            LMHead(weight),
            teacher,
            LMHead(weight.detach()),
            target_ids,
            offsets,
            impl=name,
            workspace_bytes=16 << 20,
        )
        return torch.autograd.grad(result.loss, (student, weight))

    exact = gradients(student.double(), teacher.double(), head.weight.double(), "reference")
    for ours, expected in zip(gradients(student, teacher, head.weight, impl), exact, strict=True):
        assert relative(ours, expected) < 5e-3


@pytest.mark.parametrize("impl", DESIGNS)
def test_the_same_bits_every_time(impl):
    """A race would show as a difference."""
    student, teacher, (head,), target_ids = operands(700, 512, 32003, torch.bfloat16)
    first = None
    for _ in range(6):
        d = linear_divergence(student, head, teacher, head, impl=impl)
        scores = linear_logprobs(student, head, target_ids, impl=impl).logprobs
        first = first or (d, scores)
        assert torch.equal(d, first[0])
        assert torch.equal(scores, first[1])


def problem_on_cuda(**options):
    settings = {"lengths": (33, 50), "hidden_size": 64, "vocab_size": 1009, "shared_head": True, **options}
    return make_problem(**settings).to(torch.bfloat16).map(lambda tensor: tensor.cuda())


def step(problem, **options):
    result = unisd_loss(**problem.arguments(), feature_weight=0.1, **options)
    return (result.loss.detach(), *torch.autograd.grad(result.loss, problem.leaves))


@pytest.mark.parametrize("wrong", [-1, 1009])
def test_an_id_outside_of_the_vocabulary_ends_the_process(wrong):
    """By the assertion of the kernel that reads it, at the first wait for the device."""
    program = f"""
import torch
from unisd_kernels import LMHead, linear_logprobs
head = LMHead(torch.randn(1009, 64, device="cuda", dtype=torch.bfloat16))
hidden = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
linear_logprobs(hidden, head, torch.full((8,), 1008, device="cuda"))
torch.cuda.synchronize()
print("a column passes", flush=True)
linear_logprobs(hidden, head, torch.full((8,), {wrong}, device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "a column passes" in done.stdout
    assert "target_ids outside of" in done.stdout + done.stderr


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_cuda_graph(beta, frozen_head):
    """Captured once, replayed on other numbers in the same memory."""
    problem = problem_on_cuda(frozen_head=frozen_head)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(problem, beta=beta)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(problem, beta=beta)
    with torch.no_grad():
        problem.student_hidden.mul_(0.7)
        problem.target_ids.copy_(problem.target_ids.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    for replayed, expected in zip(captured, step(problem, beta=beta), strict=True):
        torch.testing.assert_close(replayed, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_compiled_without_a_graph_break(beta):
    problem = problem_on_cuda(frozen_head=True)

    @torch.compile(fullgraph=True)
    def loss(hidden):
        arguments = {**problem.arguments(), "student_hidden": hidden}
        return unisd_loss(**arguments, beta=beta).loss

    hidden = problem.student_hidden.detach().requires_grad_()
    (ours,) = torch.autograd.grad(loss(hidden), hidden)
    expected = unisd_loss(**problem.arguments(), beta=beta).loss
    torch.testing.assert_close(ours, torch.autograd.grad(expected, problem.student_hidden)[0], rtol=2e-3, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    problem = problem_on_cuda(frozen_head=True)
    expected = step(problem)
    moved = step(problem.map(lambda tensor: tensor.to("cuda:1")))
    assert torch.cuda.current_device() == 0
    for ours, other in zip(moved, expected, strict=True):
        assert ours.device.index == 1
        torch.testing.assert_close(ours.cpu(), other.cpu(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("impl", DESIGNS)
def test_extra_memory_is_the_workspace_and_the_rows(impl):
    rows, width, columns = 4096, 1024, 64000
    student, teacher, (head,), _ = operands(rows, width, columns, torch.bfloat16)
    student.requires_grad_()

    def run():
        linear_divergence(student, head, teacher, head, impl=impl).sum().backward()

    run()
    student.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    # Row gradients in float32; blocks of teacher rows and statistics are a few megabytes.
    assert extra <= engine.default_workspace_bytes(student.device) + 4 * rows * width + (32 << 20)


def test_tuning_picks_a_candidate_and_keeps_it(tmp_path, monkeypatch):
    from unisd_kernels.backends.triton import configs

    monkeypatch.setenv("UNISD_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path))
    student, _, (head,), target_ids = operands(256, 512, 32000, torch.bfloat16)
    expected = linear_logprobs(student, head, target_ids, impl="torch").logprobs
    ours = linear_logprobs(student, head, target_ids, impl="triton").logprobs
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (file,) = tmp_path.glob("tuning-*.json")
    kept = configs._load(student.device)
    assert file.stat().st_size > 0
    key = "score/256/32000/512"
    assert kept[key] in configs.candidates("score", student.device)
    assert set(configs.measured[key]) == set(configs.candidates("score", student.device))
