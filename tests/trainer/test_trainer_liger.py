"""Liger's kernels in student and teacher, without its loss; refused where they cannot run. Its Triton functions are
replaced by what they compute: here is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import functional
from transformers.models.llama import modeling_llama

from tests.trainer import tiny_run
from unisd.cli import main


def rms_norm(x, weight, eps, offset, *_):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


@pytest.fixture
def eager_liger(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that were called."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import monkey_patch, swiglu
    from liger_kernel.transformers import rms_norm as norms

    called: list[str] = []

    def noting(name, function):
        def apply(*arguments):
            called.append(name)
            return function(*arguments)

        return staticmethod(apply)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(norms.LigerRMSNormFunction, "apply", noting("norm", rms_norm))
    feed_forward = noting("feed-forward", lambda a, b, *_: functional.silu(a) * b)
    monkeypatch.setattr(swiglu.LigerSiLUMulFunction, "apply", feed_forward)
    rotary = noting("rotary", modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(monkey_patch, "liger_rotary_pos_emb", rotary.__func__)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger replaces them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    return called


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_liger_changes_the_kernels_and_nothing_else(tmp_path, eager_liger, peft):
    gradients = {}
    for use in (False, True):
        seen = tiny_run.Gradients()
        run = tiny_run.trainer(
            tmp_path / str(use),
            preset="unisd_star",
            use_liger_kernel=use,
            peft_config=tiny_run.lora() if peft else None,
        )
        assert not eager_liger or use
        run.add_callback(seen)
        run.train()
        gradients[use] = seen.steps[0]
    tiny_run.assert_same_gradients(gradients[True], gradients[False])
    assert {"norm", "feed-forward", "rotary"} == set(eager_liger)
    assert not any(run.args.liger_kernel_config.values())  # of its losses
    eager_liger.clear()
    with run.teacher.scoring(run.accelerator.unwrap_model(run.model)) as scorer:
        scorer(torch.tensor([[5, 6]]))
    assert {"norm", "feed-forward", "rotary"} == set(eager_liger)


def test_liger_is_refused_with_the_reason(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="fused_linear_cross_entropy=true, but the loss is UniSD's own"):
        tiny_run.config(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
    flags = ["train", "--output_dir", str(tmp_path / "run"), "--bf16", "false", "--use_liger_kernel"]
    if not torch.accelerator.is_available():
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
        assert main(flags) == 2
        assert (
            "use_liger_kernel: its kernels are Triton's and need a GPU; leave it out on a CPU"
            in capsys.readouterr().err
        )
        with pytest.raises(ValueError, match="need a GPU"):
            tiny_run.trainer(tmp_path, preset="plain", use_liger_kernel=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert main(flags) == 2
    assert "needs the package liger-kernel: pip install liger-kernel" in capsys.readouterr().err
