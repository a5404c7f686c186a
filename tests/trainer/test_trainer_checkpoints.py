"""Resuming: the same run as one that was never interrupted, the teacher included, or an error."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.trainer import tiny_run
from unisd.run.checkpoints import MANIFEST, fault_of, mark_complete, newest_complete, resumable, rotate
from unisd.teachers import STATE_FILE, AdapterEMATeacher, FullEMATeacher, save_teacher
from unisd.teachers import checkpoint as checkpoint_file
from unisd.trainer import UniSDTrainer

# Completions are sampled here, so that the generator's state counts too; 8 rows are two steps an epoch, so that the
# checkpoint of step 3 lies inside the second epoch.
SETTINGS = {
    "cls": UniSDTrainer,
    "preset": "unisd_star",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 3,
    "sync_steps": 2,
    "ema_decay": 0.5,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "items": tiny_run.rows(count=8),
}


def start(folder, peft: bool, **overrides):
    return tiny_run.trainer(folder, peft_config=tiny_run.lora() if peft else None, **{**SETTINGS, **overrides})


class Restored(TrainerCallback):
    """The teacher's state when training begins."""

    def __init__(self, run):
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        self.state = self.run.teacher.state_dict()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """By mode: a finished run of 5 steps and its checkpoint of step 3, between two updates of the average."""
    runs = {}

    def get(mode):
        if mode not in runs:
            run = start(tmp_path_factory.mktemp(mode), peft=mode != "full", ema=mode)
            run.train()
            runs[mode] = (run, f"{run.args.output_dir}/checkpoint-3")
        return runs[mode]

    return get


@pytest.mark.parametrize("mode", ["full", "adapter", "merged"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, interrupted, mode):
    whole, checkpoint = interrupted(mode)
    resumed = start(tmp_path, peft=mode != "full", ema=mode)
    restored = Restored(resumed)
    resumed.add_callback(restored)
    fresh = resumed.teacher.state_dict()["tensors"]
    resumed.train(resume_from_checkpoint=checkpoint)
    # Before the first step the average is that of the file, bit for bit.
    saved = load_file(f"{checkpoint}/{STATE_FILE}")
    assert restored.state["updates"] == 1
    assert restored.state["tensors"].keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in restored.state["tensors"].items())
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in fresh.items())
    # The rest of the run is that of the whole one, up to rounding: products depend on the alignment of their operands.
    assert len(tiny_run.losses(whole)) == 5
    assert tiny_run.losses(resumed) == pytest.approx(tiny_run.losses(whole), rel=1e-4)
    assert resumed.teacher.updates == whole.teacher.updates == 2
    for name, tensor in whole.teacher.tensors().items():
        assert torch.allclose(resumed.teacher.tensors()[name], tensor, rtol=1e-3, atol=1e-4), name
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4), name


def test_order_of_the_rows_depends_on_seed_and_epoch_alone(tmp_path):
    run = start(tmp_path, peft=False, ema="none", ema_decay=None)
    epochs = []
    for epoch in (0.0, 1.0, 1.5):
        run.state.epoch = epoch
        epochs.append(list(run._get_train_sampler()))
    assert epochs[1] == epochs[2]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    run.shuffle_dataset = False
    in_order = run._get_train_sampler()
    assert list(in_order) == [0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 2
    assert len(in_order) == 16


def test_restart_of_the_average_would_be_seen(tmp_path, interrupted, monkeypatch):
    """Without the restored teacher the losses of the test above differ."""
    whole, checkpoint = interrupted("full")
    monkeypatch.setattr("unisd.run.distributed.load_teacher", lambda *args: None)
    resumed = start(tmp_path, peft=False, ema="full")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert tiny_run.losses(resumed)[3:] != pytest.approx(tiny_run.losses(whole)[3:], rel=1e-2)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ([STATE_FILE], f"checkpoint is incomplete .{STATE_FILE} is missing"),
        ([STATE_FILE, MANIFEST], f"{STATE_FILE} is missing: the checkpoint is incomplete or was written without"),
        (["optimizer.pt"], "checkpoint is incomplete .optimizer.pt is missing"),
        (["trainer_state.json", MANIFEST], "trainer_state.json is missing"),
        (["model.safetensors", MANIFEST], "it holds no weights"),
    ],
)
def test_a_path_to_an_incomplete_checkpoint_raises(tmp_path, interrupted, gone, message):
    _, checkpoint = interrupted("full")
    broken = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    for name in gone:
        (broken / name).unlink()
    resumed = start(tmp_path / "run", peft=False, ema="full")
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=str(broken))
    assert resumed.teacher.updates == 0  # nothing was trained


def test_resuming_takes_the_newest_complete_checkpoint(tmp_path, interrupted):
    """Beside the whole checkpoint of step 3 lie newer ones as kills leave them: each cut off at another file."""
    whole, checkpoint = interrupted("full")
    shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    files = sorted(path.name for path in Path(checkpoint).iterdir() if path.suffix != ".md" and path.name != MANIFEST)
    assert "trainer_state.json" in files
    for number, name in enumerate(files):
        folder = shutil.copytree(checkpoint, tmp_path / f"checkpoint-{10 + number}")
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    started = tmp_path / "checkpoint-90"
    started.mkdir()
    shutil.copy(Path(checkpoint) / STATE_FILE, started)
    assert str(get_last_checkpoint(str(tmp_path))) == str(started)  # what would be taken
    resumed = start(tmp_path, peft=False, ema="full")
    restored = Restored(resumed)
    resumed.add_callback(restored)
    with pytest.warns(UserWarning, match="incomplete and was skipped") as caught:
        resumed.train(resume_from_checkpoint=True)
    said = [str(entry.message) for entry in caught if "was skipped" in str(entry.message)]
    assert len(said) == len(files) + 1
    assert "checkpoint-90 is incomplete and was skipped: trainer_state.json is missing" in said[0]
    assert restored.state["updates"] == 1
    assert tiny_run.losses(resumed) == pytest.approx(tiny_run.losses(whole), rel=1e-4)


def test_nothing_complete_to_resume_from_raises(tmp_path):
    run = start(tmp_path, peft=False, ema="none", ema_decay=None)
    with pytest.raises(ValueError, match="there is no complete checkpoint in"):
        run.train(resume_from_checkpoint=True)
    assert resumable(None, tmp_path) is None
    assert resumable(False, tmp_path) is None


def test_a_folder_of_the_plain_trainer_is_judged_by_its_files(tmp_path, interrupted):
    """No manifest: a safetensors file that was cut off, and a shard that is not there, are found."""
    _, checkpoint = interrupted("full")
    plain = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    (plain / MANIFEST).unlink()
    assert fault_of(plain) is None
    weights = (plain / "model.safetensors").read_bytes()
    (plain / "model.safetensors").write_bytes(weights[:-1])
    assert fault_of(plain) == f"model.safetensors has {len(weights) - 1} bytes for {len(weights)}"
    (plain / "model.safetensors").write_bytes(weights[:5])
    assert fault_of(plain) == "model.safetensors was cut off"
    (plain / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    (plain / "model-1-of-2.safetensors").write_bytes(weights)
    assert fault_of(plain) == "model-2-of-2.safetensors is missing"
    (plain / "model-2-of-2.safetensors").write_bytes(weights)
    assert fault_of(plain) is None
    (plain / "trainer_state.json").write_text('{"epoch": 1')
    assert fault_of(plain) == "trainer_state.json was cut off"


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    """One checkpoint is kept. While the next is written, and until its last file is, the old one stays."""
    run = start(tmp_path, peft=True, ema="adapter", save_steps=1, max_steps=2, save_total_limit=1)
    marked = []

    def dies_at_the_second(folder, step):
        marked.append(newest_complete(tmp_path))
        if step == 2:
            raise KeyboardInterrupt
        mark_complete(folder, step)

    monkeypatch.setattr("unisd.run.checkpointed.mark_complete", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert (tmp_path / "checkpoint-1" / MANIFEST).is_file()
    assert fault_of(tmp_path / "checkpoint-1") is None
    assert run.args.save_total_limit == 1


def test_deletion_spares_the_newest_and_the_best_and_takes_what_is_broken_first(tmp_path):
    def folder(step, complete, age):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        (path / "optimizer.pt").write_bytes(b"x")
        if complete:
            mark_complete(path, step)
        os.utime(path, (1e9 - 100 * age,) * 2)
        return path

    for step, complete, age in ((10, True, 5), (20, True, 4), (30, True, 3), (900, False, 2), (40, True, 0)):
        folder(step, complete, age)
    rotate(tmp_path, 4, {str(tmp_path / "checkpoint-40")})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (10, 20, 30, 40)]
    rotate(tmp_path, 2, {str(tmp_path / "checkpoint-40"), str(tmp_path / "checkpoint-10")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-40"]
    rotate(tmp_path, None, set())
    assert len(list(tmp_path.iterdir())) == 2


def test_deletion_that_is_cut_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, interrupted):
    _, checkpoint = interrupted("full")
    old = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    shutil.copytree(checkpoint, tmp_path / "checkpoint-4")
    monkeypatch.setattr("unisd.run.checkpoints.shutil.rmtree", lambda *args, **kwargs: None)  # killed here
    rotate(tmp_path, 1, {str(tmp_path / "checkpoint-4")})
    assert fault_of(old) == "trainer_state.json is missing"


def test_average_of_another_step_or_mode_raises(tmp_path, interrupted):
    _, checkpoint = interrupted("adapter")
    mixed = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    run = start(tmp_path / "run", peft=True, ema="adapter")
    save_teacher(run.teacher, mixed, global_step=2)
    with pytest.raises(ValueError, match="written at step 2 but the checkpoint is of step 3"):
        run.train(resume_from_checkpoint=str(mixed))
    with pytest.raises(ValueError, match="ema='adapter' but this run has ema='merged'"):
        start(tmp_path / "other", peft=True, ema="merged").train(resume_from_checkpoint=checkpoint)


def test_average_is_written_before_anything_else(tmp_path, monkeypatch):
    """A run killed while it writes a checkpoint leaves the average, or a folder that cannot be resumed from."""
    run = start(tmp_path, peft=True, ema="adapter", save_steps=1, max_steps=1)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [file.name for file in (tmp_path / "checkpoint-1").iterdir()] == [STATE_FILE]


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    from peft import get_peft_model

    model = get_peft_model(tiny_run.llama(), tiny_run.lora())
    teacher = AdapterEMATeacher(model, 0.5)
    path = save_teacher(teacher, tmp_path, 1)
    content = path.read_bytes()

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_file.os, "replace", fails)
    tiny_run.perturb(model)
    teacher.update(model)
    with pytest.raises(OSError, match="disk full"):
        save_teacher(teacher, tmp_path, 2)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_state_dict_restores_bit_for_bit():
    model = tiny_run.llama().bfloat16()
    teacher = FullEMATeacher(model, 0.98)
    tiny_run.perturb(model)
    teacher.update(model)
    state = teacher.state_dict()
    tiny_run.perturb(model)
    teacher.update(model)
    assert any(not torch.equal(tensor, state["tensors"][name]) for name, tensor in teacher.tensors().items())
    teacher.load_state_dict(state)
    assert teacher.updates == 1
    with teacher.scoring(model) as scorer:
        weights = dict(scorer.named_parameters())
        for name, tensor in teacher.tensors().items():
            assert torch.equal(tensor, state["tensors"][name])
            assert torch.equal(weights[name], tensor.bfloat16())


def test_no_file_without_an_average(tmp_path):
    run = start(tmp_path, peft=False, ema="none", ema_decay=None, max_steps=3)
    run.train()
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").is_file()
    assert not (tmp_path / "checkpoint-3" / STATE_FILE).exists()
    # Turning the average on at a resume has nothing to start from.
    with pytest.raises(ValueError, match="is missing"):
        start(tmp_path, peft=False, ema="full").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
