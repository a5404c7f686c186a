"""The exported teacher is the teacher: the same logits, from the run's folder and from a checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.trainer import tiny_run
from unisd.cli import main
from unisd.models import load_model
from unisd.run.export import export_model

IDS = torch.tensor([[5, 9, 17, 33, 2]])


def trained(folder, mode: str, dtype=torch.float32, **settings):
    """A run of three steps in `folder`/run, and the logits of its teacher and of its student."""
    base = folder / "base"
    tiny_run.llama().to(dtype).save_pretrained(base)
    tiny_run.tokenizer().save_pretrained(base)
    adapted = None if mode in ("full", "none") else tiny_run.lora(modules_to_save=["norm"])
    run = tiny_run.trainer(
        folder / "run",
        load_model(base, dtype=dtype)[0].train(),
        peft_config=adapted,
        **{
            "preset": "ema",
            "ema": mode,
            "sync_steps": 1,
            "ema_decay": 0.5,
            "max_steps": 3,
            "learning_rate": 0.5,
            "save_strategy": "steps",
            "save_steps": 2,
            **settings,
        },
    )
    run.train()
    run.save_finished()
    student = run.accelerator.unwrap_model(run.model).eval()
    with run.teacher.scoring(student) as scorer:
        teacher = scorer(IDS).logits.clone()
    with torch.no_grad():
        return teacher, student(IDS).logits


def logits(folder, dtype=torch.float32) -> torch.Tensor:
    model, tokenizer = load_model(folder, dtype=dtype)
    assert tokenizer.eos_token_id == tiny_run.EOS
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("mode", "flags"), [("full", []), ("adapter", []), ("adapter", ["--merge"]), ("merged", [])], ids=str
)
def test_the_exported_model_has_the_teachers_logits(tmp_path, mode, flags, capsys):
    teacher, student = trained(tmp_path, mode)
    assert (student - teacher).abs().max() > 1e-3  # else the student itself would pass
    out = tmp_path / "out"
    assert main(["export", "--ema", str(tmp_path / "run"), "-o", str(out), *flags]) == 0
    assert f"ema={mode}, 3 updates, step 3" in capsys.readouterr().out
    torch.testing.assert_close(logits(out), teacher, rtol=1e-4, atol=1e-5)
    assert (mode == "adapter" and not flags) == (out / "adapter_config.json").is_file()
    assert "moving-average teacher of `run`" in (out / "README.md").read_text()


def test_a_run_that_did_not_finish_gives_its_newest_whole_checkpoint(tmp_path):
    teacher, _ = trained(tmp_path, "adapter")
    run = tmp_path / "run"
    (run / "unisd_ema_teacher.safetensors").unlink()
    exported = export_model(run, tmp_path / "out", ema=True)
    assert exported.checkpoint == run / "checkpoint-3"
    torch.testing.assert_close(logits(tmp_path / "out"), teacher, rtol=1e-4, atol=1e-5)

    (run / "checkpoint-3/adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="is incomplete"):
        export_model(run / "checkpoint-3", tmp_path / "other", ema=True)
    with pytest.warns(UserWarning, match="incomplete and was skipped"):
        assert export_model(run, tmp_path / "other", ema=True).checkpoint.name == "checkpoint-2"


def test_a_16_bit_teacher_is_rounded_from_its_average_once(tmp_path):
    teacher, _ = trained(tmp_path, "full", torch.bfloat16)
    export_model(tmp_path / "run", tmp_path / "out", ema=True)
    assert load_model(tmp_path / "out", dtype="auto")[0].dtype == torch.bfloat16
    assert logits(tmp_path / "out", torch.bfloat16).equal(teacher)


def test_without_ema_it_is_the_student(tmp_path):
    _, student = trained(tmp_path, "adapter")
    export_model(tmp_path / "run", tmp_path / "out", ema=False, merge=True)
    torch.testing.assert_close(logits(tmp_path / "out"), student, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path):
    trained(tmp_path, "none")
    run = tmp_path / "run"
    for source, options, said in (
        (run, {"ema": True}, "holds no moving-average teacher"),
        (run / "nowhere", {"ema": True}, "is not a folder"),
        (run, {"ema": False, "merge": True}, "nothing to merge"),
        (run, {"ema": False, "base": "x"}, "it has no base"),
        (tmp_path / "base", {"ema": False}, "neither a finished model nor a complete checkpoint"),
    ):
        with pytest.raises(ValueError, match=said):
            export_model(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="exists already"):
        export_model(run, run, ema=False)
    assert not (tmp_path / "out").exists()


def test_an_average_of_another_model_is_refused(tmp_path):
    trained(tmp_path / "a", "full")
    trained(tmp_path / "b", "adapter")
    name = "run/checkpoint-3/unisd_ema_teacher.safetensors"
    shutil.copy(tmp_path / "a" / name, tmp_path / "b" / name)
    (tmp_path / "b/run/checkpoint-3/unisd_checkpoint.json").unlink()
    with pytest.raises(ValueError, match="ema='full', which does not fit a model with an adapter"):
        export_model(tmp_path / "b/run/checkpoint-3", tmp_path / "out", ema=True)
    assert not (tmp_path / "out").exists()
