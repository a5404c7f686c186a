"""On a CUDA device: 16-bit products with float32 results, no synchronization on the path of a step, autocast, streams.

Run by `scripts/gpu_suite.sh`; skipped without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from tests.support import Problem, assert_accurate, make_problem, native_dtype_logits
from tests.triton.support import GPU_FLOOR
from unisd_kernels import agreement_weights, linear_divergence, linear_logprobs, unisd_loss

pytestmark = pytest.mark.gpu

OPTIONS = {"feature_weight": 0.2, "contrastive_margin": 1.0, "agreement_gamma": 0.5, "temperature": 0.7}


def on_cuda(problem: Problem) -> Problem:
    """The same problem on the GPU, as fresh leaves."""
    return problem.map(lambda tensor: tensor.cuda())


def run(problem, impl, **options):
    result = unisd_loss(**problem.arguments(), impl=impl, **{**OPTIONS, **options})
    return result.loss.detach(), torch.autograd.grad(result.loss, problem.leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("extras", [{}, {"bias": True, "softcap": 20.0, "logit_scale": 0.5}, {"padded_vocab": 5}])
def test_unisd_loss(dtype, frozen_head, beta, extras):
    shape = {"lengths": (33, 0, 50), "hidden_size": 64, "vocab_size": 1009}
    exact = on_cuda(make_problem(dtype=dtype, frozen_head=frozen_head, **shape, **extras))
    problem = on_cuda(make_problem(dtype=dtype, frozen_head=frozen_head, **shape, **extras).to(dtype))
    expected = run(exact, "reference", beta=beta)
    ours = run(problem, None, beta=beta, workspace_bytes=256 << 10)
    with native_dtype_logits():
        native = run(problem, "reference", beta=beta)
    assert_accurate("loss", ours[0], expected[0], native[0], GPU_FLOOR)
    for position, tensors in enumerate(zip(ours[1], expected[1], native[1], strict=True)):
        assert_accurate(f"gradient {position}", *tensors, GPU_FLOOR)


def test_no_synchronization_in_a_step():
    problem = on_cuda(make_problem(lengths=(33, 50), hidden_size=64, vocab_size=1009).to(torch.bfloat16))
    for clip in ({}, {"clip_cap": 1.0}, {"clip_quantile": 0.9}):
        run(problem, None, **clip)  # compiles what is compiled at first use
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(problem, None, **clip)
            logprobs = linear_logprobs(problem.student_hidden, problem.student_head, problem.target_ids).logprobs
            agreement_weights(logprobs.detach().expand(3, -1), problem.cu_seqlens, level="sequence")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream_and_autocast():
    problem = on_cuda(make_problem(lengths=(33, 50), hidden_size=64, vocab_size=1009).to(torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        expected = run(problem, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
        ours = run(problem, None)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(ours[0], expected[0])
    narrow = problem.to(torch.bfloat16)
    torch.testing.assert_close(ours[0], run(narrow, None)[0], rtol=1e-5, atol=1e-6)


def test_workspace_bounds_the_memory():
    problem = on_cuda(make_problem(lengths=(2048,), hidden_size=64, vocab_size=32003, frozen_head=True))
    problem = problem.to(torch.bfloat16)
    workspace = 32 << 20

    def step():
        d = linear_divergence(
            problem.student_hidden,
            problem.student_head,
            problem.teacher_hidden,
            problem.teacher_head,
            beta=0.5,
            workspace_bytes=workspace,
        )
        d.sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    # Logits within the workspace; beside them a 16-bit gradient tile, elementwise blocks and the [N, H] result.
    assert torch.cuda.max_memory_allocated() - before < 12 * workspace
