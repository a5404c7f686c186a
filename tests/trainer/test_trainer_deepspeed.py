"""Every kind of teacher under DeepSpeed is what it is in one process; saved on 2 ranks, resumed on 2, and on 1 and 3.

Skipped without DeepSpeed: `scripts/deepspeed.sh run` has it, in an environment of its own.
"""

from __future__ import annotations

import json

import pytest

from tests.cli.test_launch import started
from tests.trainer import sharded_worker, tiny_run
from tests.trainer.test_trainer_sharded import check_equal, check_finished_run_is_a_model, groups, of
from unisd.run.checkpoints import fault_of
from unisd.teachers import STATE_FOLDER, put_average

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.exhaustive

KINDS = ",".join(sharded_worker.KINDS)


@pytest.mark.parametrize("engine", list(sharded_worker.STAGES))
def test_every_kind_of_teacher(tmp_path, engine):
    groups(tmp_path, engine, KINDS, "alone,train,resume2")
    for kind in sharded_worker.KINDS:
        alone, train = of(tmp_path, kind, "alone"), of(tmp_path, kind, "train")
        assert train["type"] == "DistributedType.DEEPSPEED"
        assert len(alone["losses"]) == len(train["losses"]) == sharded_worker.STEPS
        assert len(train["drift"]) == len(alone["drift"]) == 4
        check_equal(train, alone)
        check_equal(of(tmp_path, kind, "resume2"), train)
        if "held" in train and engine != "zero2":
            assert train["held"] <= 0.51 * alone["held"]  # of the average a rank holds its parts
        assert fault_of(tmp_path / kind / "run" / "checkpoint-3") is None
    check_finished_run_is_a_model(tmp_path)
    if engine != "zero2":
        check_average_of_parts_is_exported(tmp_path)


def check_average_of_parts_is_exported(folder):
    """The average of the run of two processes is that of one, in its shapes."""
    found = put_average(tiny_run.llama(seed=1), folder / "full" / "run")
    expected = put_average(tiny_run.llama(seed=2), folder / "full" / "alone")
    for name, weight in expected.named_parameters():
        assert (found.get_parameter(name) - weight).abs().mean() < 1e-4, name
    assert (folder / "full" / "run" / STATE_FOLDER).is_dir()


def test_a_universal_checkpoint_of_zero3_is_resumed_by_any_number(tmp_path):
    groups(tmp_path, "zero3", "full", "alone,train,universal1,universal2,universal3")
    for processes in (1, 2, 3):
        check_equal(of(tmp_path, "full", f"universal{processes}"), of(tmp_path, "full", "train"))


def test_another_number_of_processes_is_refused(tmp_path):
    groups(tmp_path, "zero3", "full", "alone,train")
    with pytest.raises(AssertionError, match=r"was written by 2 processes, .* on as many, not on 3"):
        groups(tmp_path, "zero3", "full", "resume3")


def test_a_rank_without_a_token_and_an_uneven_last_batch_hang_nobody(tmp_path):
    groups(tmp_path, "zero3", "full", "masked-alone,masked")
    check_equal(of(tmp_path, "full", "masked"), of(tmp_path, "full", "masked-alone"))


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("ema", ["full", "merged"])
def test_a_run_is_launched(tmp_path, engine, ema):
    settings = {"ema": ema, "use_peft": ema != "full", "save_strategy": "steps", "save_steps": 1}
    done = started(tmp_path, "unisd", "launch", engine, "--num_processes", "2", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("where things are") == 1
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert fault_of(checkpoint) is None
    assert len(list(checkpoint.glob("global_step1/*optim_states.pt"))) == 2  # DeepSpeed, not a silent DDP
    assert (checkpoint / STATE_FOLDER).is_dir() == (engine == "zero3")
    done = started(tmp_path, "unisd", "launch", engine, "--num_processes", "2", resume=True, **settings, max_steps=3)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
