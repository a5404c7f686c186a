"""A training step on a CUDA device: the loss of the same completions on the CPU, and rollouts that need nothing of it.

Run by `scripts/gpu_suite.sh`; skipped without a GPU, or without TRL.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from bench.studies.step_runs import OURS, TINY, make_workbench

pytestmark = pytest.mark.gpu
BATCH_SIZE, NEW_TOKENS = 3, 9


def bench_on(device: str, folder):
    return make_workbench(TINY, torch.device(device), BATCH_SIZE, NEW_TOKENS, str(folder))


@pytest.mark.parametrize("variant", ["unisd_star", "plain", "sdft", "gkd", "agreement_token-q0.25", "match_repr"])
def test_the_loss_is_that_of_a_cpu(variant, tmp_path):
    cpu = bench_on("cpu", tmp_path / "cpu")
    completions = cpu.trainer(variant, OURS).rollout(cpu.rows)
    expected = cpu.trainer(variant, OURS, completions).optimizer_step(cpu.rows)
    cuda = bench_on("cuda", tmp_path / "cuda")
    trainer = cuda.trainer(variant, OURS, completions)
    loss = trainer.optimizer_step(cuda.rows)
    assert loss.device.type == "cuda"
    # TF32 is not on by default, and the model is float32: sums of 32 numbers, softmaxes of 256.
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-3, atol=1e-6)


def test_a_rollout_and_a_step_in_bfloat16(tmp_path):
    bench = bench_on("cuda", tmp_path)
    bench.model.to(torch.bfloat16)
    sampler = bench.trainer("unisd_star", OURS)
    completions = sampler.rollout(bench.rows)
    assert [len(each) for each in completions] == [NEW_TOKENS] * BATCH_SIZE
    loss = sampler.optimizer_step(bench.rows)
    assert torch.isfinite(loss)
    assert loss > 0
