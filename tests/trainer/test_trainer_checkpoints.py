"""Resuming: the same run as one that was never interrupted, the teacher included, or an error."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.trainer import tiny_run
from unisd import teachers
from unisd.teachers import STATE_FILE, AdapterEMATeacher, save_teacher
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
    monkeypatch.setattr("unisd.trainer.load_teacher", lambda *args: None)
    resumed = start(tmp_path, peft=False, ema="full")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert tiny_run.losses(resumed)[3:] != pytest.approx(tiny_run.losses(whole)[3:], rel=1e-2)


def test_checkpoint_without_the_average_raises(tmp_path, interrupted):
    _, checkpoint = interrupted("full")
    broken = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    (broken / STATE_FILE).unlink()
    resumed = start(tmp_path / "run", peft=False, ema="full")
    with pytest.raises(ValueError, match=f"{STATE_FILE} is missing: the checkpoint is incomplete"):
        resumed.train(resume_from_checkpoint=str(broken))
    assert tiny_run.losses(resumed) == tiny_run.losses(interrupted("full")[0])[:3]  # nothing was trained


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

    monkeypatch.setattr(teachers.os, "replace", fails)
    tiny_run.perturb(model)
    teacher.update(model)
    with pytest.raises(OSError, match="disk full"):
        save_teacher(teacher, tmp_path, 2)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_state_dict_restores_bit_for_bit():
    model = tiny_run.llama().bfloat16()
    teacher = teachers.FullEMATeacher(model, 0.98)
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
