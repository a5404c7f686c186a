"""A run that is killed with SIGKILL, at any moment, resumes to the undisturbed run's losses and weights."""

from __future__ import annotations

import json
import signal

import pytest

from tests.processes import run_module


@pytest.mark.parametrize(
    "count",
    [pytest.param(4, id="some"), pytest.param(0, id="all", marks=pytest.mark.exhaustive)],
)
def test_killed_at_any_moment_and_resumed_is_as_never_killed(tmp_path, count):
    said = run_module("tests.trainer.kill_worker", tmp_path, count, timeout=3600)
    result = json.loads(said.splitlines()[-1])
    whole, killed = result["whole"], result["killed"]
    assert len(killed) == (count or whole["moments"]) + 1 > 4
    assert {end["ended_by"] for end in killed.values()} == {signal.SIGKILL}
    for moment, end in killed.items():
        assert end["digest"] == whole["digest"], moment
        # A resumed run logs what it trained itself.
        assert end["losses"] == whole["losses"][-len(end["losses"]) :], moment


def test_room_on_the_disk_is_asked_for_before_training_and_waited_for_before_a_checkpoint(
    tmp_path, monkeypatch, caplog
):
    from tests.trainer import tiny_run
    from unisd.run import disk

    run = tiny_run.trainer(tmp_path / "none", save_strategy="steps", save_steps=1, max_steps=2, preset="unisd_star")
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    with pytest.raises(ValueError, match=r"a checkpoint of this run takes .* has 0\.0 MB left: make room"):
        run.train()
    assert not list((tmp_path / "none").glob("checkpoint-*"))

    # Room at the start, none at the second checkpoint, then again.
    run = tiny_run.trainer(tmp_path / "some", save_strategy="steps", save_steps=1, max_steps=2, preset="unisd_star")
    waits = []
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000 if run.state.global_step == 2 and not waits else 10**12)
    monkeypatch.setattr(disk.time, "sleep", waits.append)
    run.train()
    assert waits == [10.0]
    assert [r.getMessage() for r in caplog.records if "is full: the checkpoint of step 2 takes" in r.getMessage()]
    assert (tmp_path / "some/checkpoint-2/unisd_checkpoint.json").is_file()


def test_a_disk_that_stays_full_ends_the_wait_with_the_way_out(tmp_path, monkeypatch):
    from unisd.run import disk

    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
    monkeypatch.setattr(disk.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match=r"after 5 minutes of waiting; what was saved before is untouched.*--resume"):
        disk.wait_for_room(tmp_path, 10**9, "the model", minutes=5)


def test_the_estimate_of_a_checkpoint_is_its_size(tmp_path):
    from tests.trainer import tiny_run
    from unisd.run import disk

    for name, peft in (("full", None), ("lora", tiny_run.lora())):
        run = tiny_run.trainer(
            tmp_path / name,
            peft_config=peft,
            save_strategy="steps",
            save_steps=1,
            preset="unisd_star",
            optim="adamw_torch",
        )
        before = disk.checkpoint_bytes(run) - disk._SPARE_BYTES
        run.train()
        folder = tmp_path / name / "checkpoint-1"
        tensors = ("model.safetensors", "adapter_model.safetensors", "optimizer.pt", "unisd_ema_teacher.safetensors")
        written = sum((folder / file).stat().st_size for file in tensors if (folder / file).is_file())
        after = disk.checkpoint_bytes(run) - disk._SPARE_BYTES
        # File formats add names and headers, which the spare bytes cover.
        assert before <= written <= before + 200_000
        assert after <= written <= after + 200_000
