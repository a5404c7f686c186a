"""Every kind of teacher under FSDP2 and DDP is what it is in one process; saved on 2 ranks, resumed on 1 and on 3."""

from __future__ import annotations

import json

import pytest
import torch
import trl
from safetensors.torch import load_file

from tests.processes import run_module
from tests.trainer import sharded_worker, tiny_run
from unisd.run.checkpoints import MANIFEST, fault_of
from unisd.run.export import export_model
from unisd.teachers import STATE_FOLDER, ShardedEMATeacher, load_teacher, put_average

IS_NEWEST_TRL = tuple(map(int, trl.__version__.split(".")[:2])) >= (1, 16)


def groups(folder, engine: str, kinds: str, parts: str) -> None:
    run_module("tests.trainer.sharded_worker", folder, engine, kinds, parts, timeout=1800, CUDA_VISIBLE_DEVICES="")


def of(folder, kind: str, part: str) -> dict:
    return json.loads((folder / kind / f"{part}.json").read_text())


def check_equal(found: dict, expected: dict) -> None:
    count = len(found["losses"])
    assert found["losses"] == pytest.approx(expected["losses"][-count:], abs=1e-5)
    count = len(found["drift"])
    assert found["drift"] == pytest.approx(expected["drift"][-count:], abs=1e-5)


def check_engine(folder, engine: str, kind: str, parts: list[str]) -> None:
    alone, train = of(folder, kind, "alone"), of(folder, kind, "train")
    assert train["type"] == {"fsdp2": "DistributedType.FSDP", "ddp": "DistributedType.MULTI_CPU"}[engine]
    assert len(alone["losses"]) == sharded_worker.STEPS
    check_equal(train, alone)
    for part in parts:
        check_equal(of(folder, kind, part), train)
    if "held" in train and engine == "fsdp2":
        assert train["held"] <= 0.51 * alone["held"]  # of the average a rank holds its shards


@pytest.mark.skipif(not IS_NEWEST_TRL, reason="two groups of processes cost as much as a hundred other tests")
def test_fsdp2(tmp_path):
    groups(tmp_path, "fsdp2", "full,merged", "alone,train")
    for kind in ("full", "merged"):
        check_engine(tmp_path, "fsdp2", kind, [])
    check_average_of_shards_is_exported(tmp_path)
    check_finished_run_is_a_model(tmp_path)
    check_checkpoint_of_shards(tmp_path / "merged" / "run" / "checkpoint-3")


def check_average_of_shards_is_exported(folder):
    """One process without a group reads the average that two wrote, into a whole model."""
    run = folder / "full" / "run"
    model = put_average(tiny_run.llama(seed=1), run)
    other = ShardedEMATeacher(tiny_run.llama(seed=2), 0.5)
    load_teacher(other, run, sharded_worker.STEPS)
    for name, tensor in other.tensors().items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert (run / STATE_FOLDER).is_dir()


def check_finished_run_is_a_model(folder):
    for kind, file in (("full", "model.safetensors"), ("merged", "adapter_model.safetensors")):
        found, expected = (load_file(folder / kind / part / file) for part in ("run", "alone"))
        assert found.keys() == expected.keys()
        start = tiny_run.llama().state_dict()
        for name, weight in expected.items():
            assert (found[name] - weight).abs().mean() < 1e-4, name
            assert kind != "full" or (start[name] - weight).abs().mean() > 1e-3, name


def check_checkpoint_of_shards(checkpoint):
    assert not list(checkpoint.glob("*.safetensors"))  # nobody gathered the model
    assert fault_of(checkpoint) is None
    with pytest.raises(ValueError, match=r"holds weights in shards \(FSDP2\): export the folder of the finished"):
        export_model(checkpoint, checkpoint.parent / "exported", ema=False)
    (checkpoint / MANIFEST).rename(checkpoint.parent / MANIFEST)
    assert "comes last where several processes write" in str(fault_of(checkpoint))
    (checkpoint.parent / MANIFEST).rename(checkpoint / MANIFEST)
    (checkpoint / "rng_state_1.pth").unlink()
    assert fault_of(checkpoint) == "rng_state_1.pth is missing"


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
@pytest.mark.parametrize("kind", list(sharded_worker.KINDS))
def test_every_kind_of_teacher_under_every_engine(tmp_path, engine, kind):
    groups(tmp_path, engine, kind, "alone,train,resume1,resume3")
    check_engine(tmp_path, engine, kind, ["resume1", "resume3"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
@pytest.mark.parametrize("when", ["step", "average", "optimizer", "rng"])
def test_a_killed_rank_costs_the_step(tmp_path, engine, when):
    groups(tmp_path, engine, "full", f"long,kill-{when}")
    folder = tmp_path / "full" / f"kill-{when}"
    assert fault_of(folder / "checkpoint-6") is None
    found = of(tmp_path, "full", f"after-kill-{when}")
    # Of the step that was lost, or of the checkpoint that was not finished.
    assert found["resumed_from"].endswith("checkpoint-3")
    assert len(found["losses"]) == 7
    check_equal(found, of(tmp_path, "full", "long"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_rank_without_a_token_and_an_uneven_last_batch_hang_nobody(tmp_path, engine, kind):
    groups(tmp_path, engine, kind, "masked-alone,masked")
    alone, masked = of(tmp_path, kind, "masked-alone"), of(tmp_path, kind, "masked")
    check_equal(masked, alone)
    assert len(masked["losses"]) == 3
    assert 0 < masked["evaluated"][0] < 10
