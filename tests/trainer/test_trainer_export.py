"""The exported teacher is the teacher: the same logits, from the run's folder and from a checkpoint."""

from __future__ import annotations

import pytest
import torch

from tests.trainer import tiny_run
from unisd.cli import main
from unisd.models import load_model


@pytest.mark.parametrize(
    ("mode", "flags"), [("full", []), ("adapter", []), ("adapter", ["--merge"]), ("merged", [])], ids=str
)
def test_the_exported_model_has_the_teachers_logits(tmp_path, mode, flags):
    base = tmp_path / "base"
    tiny_run.llama().save_pretrained(base)
    tiny_run.tokenizer().save_pretrained(base)
    model = load_model(base)[0].train()
    run = tiny_run.trainer(
        tmp_path / "run",
        model,
        peft_config=None if mode == "full" else tiny_run.lora(),
        preset="ema",
        ema=mode,
        sync_steps=1,
        ema_decay=0.5,
        max_steps=3,
        learning_rate=0.5,
        save_strategy="steps",
        save_steps=3,
    )
    run.train()
    ids = torch.tensor([[5, 9, 17, 33, 2]])
    student = run.accelerator.unwrap_model(run.model).eval()
    with run.teacher.scoring(student) as scorer:
        expected = scorer(ids).logits.clone()
    with torch.no_grad():
        assert (student(ids).logits - expected).abs().max() > 1e-3  # else the student itself would pass
    assert main(["export", "--ema", str(tmp_path / "run/checkpoint-3"), "-o", str(tmp_path / "out"), *flags]) == 0
    exported, tokenizer = load_model(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert tokenizer.eos_token_id == tiny_run.EOS
    assert (mode == "adapter" and not flags) == (tmp_path / "out/adapter_config.json").is_file()


def test_a_folder_without_an_average_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert main(["export", "--ema", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 2
    assert "holds no moving average" in capsys.readouterr().err
