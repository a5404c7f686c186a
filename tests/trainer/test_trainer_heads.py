"""The trainer verifies its student's head at construction, once, and every head of the run has what was found."""

from types import SimpleNamespace

import pytest
import torch

from tests.trainer import tiny_run
from unisd.modules import model_head


def test_a_head_that_is_not_the_models_own_is_refused_before_any_rollout(tmp_path):
    model = tiny_run.llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(ValueError, match=r"A logit_scale of 0\.5 explains it"):
        tiny_run.trainer(tmp_path, model)


@pytest.mark.parametrize("ema", ["none", "full"])
def test_a_scale_that_the_forward_ignores_changes_no_loss(tmp_path, ema):
    """Llama's forward knows no `logit_scale`: student, teacher's copy and drift all go without it."""
    losses = []
    for fields in ({}, {"logit_scale": 0.25}):
        model = tiny_run.llama(**fields)
        calls = []
        model.lm_head.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        settings = {"preset": "plain", "ema": ema, "drift_probe": tiny_run.PROBE, "drift_probe_every": 1}
        run = tiny_run.trainer(tmp_path, model, max_steps=2, **settings)
        verified = len(calls)
        run.train()
        assert verified == 2  # the two passes of the check
        assert len(calls) == verified  # and none in a step, of the model or of the teacher's copy
        losses.append([tiny_run.losses(run), tiny_run.logged(run, "unisd/drift_kl")])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-4)


def test_mixed_precision(tmp_path):
    run = tiny_run.trainer(tmp_path, tiny_run.llama(), preset="plain", bf16=True)
    run.train()
    assert model_head(run.model).logit_scale == 1.0


def test_sharded_weights(tmp_path):
    run = tiny_run.trainer(tmp_path, tiny_run.llama(), preset="plain", ema="none")
    student = run.accelerator.unwrap_model(run.model)
    # FSDP shards later: the first process checks for all.
    run._dist = SimpleNamespace(is_zero3=False, is_fsdp=True)
    del student._unisd_head
    run._check_head(student)
    assert student._unisd_head.logit_scale == 1.0
    del student._unisd_head
    handle = student.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(ValueError, match="explains it"):
        run._check_head(student)
    # ZeRO-3 has done so already: nothing can be run, and that is said.
    run._dist = SimpleNamespace(is_zero3=True, is_fsdp=False)
    with pytest.warns(UserWarning, match=r"logit_scale=1, softcap=None from its configuration and is not checked"):
        run._check_head(student)
    handle.remove()
    assert torch.equal(model_head(student).weight, student.lm_head.weight)
