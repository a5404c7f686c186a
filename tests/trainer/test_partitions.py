"""Parts of ZeRO-3: what lies where, and what is told of a run. `test_trainer_deepspeed.py` has DeepSpeed itself."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from torch import distributed, nn
from torch.distributed import checkpoint as sharded_checkpoint
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.trainer import tiny_run
from unisd.partitions import is_partitioned, part
from unisd.run.deepspeed import check_processes, separate_steps
from unisd.run.disk import _bytes
from unisd.sharding import copy_of, local, numel_of, shape_of
from unisd.teachers import STATE_FOLDER, make_teacher, put_average


@pytest.fixture(params=range(4))
def rank(request):
    """Be one of four processes, that hear nothing of each other."""
    distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    distributed.destroy_process_group()


def partitioned(rank: int, whole: torch.Tensor) -> nn.Parameter:
    """As DeepSpeed leaves a weight: no numbers in it, its part beside it, padded with what was in memory."""
    size = -(-whole.numel() // 4)
    parameter = nn.Parameter(torch.empty(0))
    flat = torch.cat([whole.flatten(), torch.full((4 * size - whole.numel(),), float("nan"))])
    parameter.ds_tensor = flat[rank * size :][:size].clone()
    parameter.ds_numel, parameter.ds_shape = whole.numel(), whole.shape
    parameter.ds_process_group = distributed.group.WORLD
    return parameter


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (5,), (1,)])
def test_a_part_is_live_and_without_padding(rank, shape):
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    parameter = partitioned(rank, whole)
    assert is_partitioned(parameter)
    assert (numel_of(parameter), shape_of(parameter)) == (whole.numel(), shape)
    assert _bytes([parameter]) == 4 * whole.numel()
    size = -(-whole.numel() // 4)
    assert torch.equal(local(parameter), whole.flatten()[rank * size : (rank + 1) * size])
    assert not local(parameter).requires_grad
    local(parameter).fill_(7)
    assert bool((parameter.ds_tensor[: len(part(parameter))] == 7).all())


def test_a_copy_lies_as_the_weight_and_as_torch_cuts(rank):
    whole = torch.arange(10.0).view(2, 5)
    parameter = partitioned(rank, whole)
    copied = copy_of(parameter, torch.float64)
    assert (copied.shape, copied.dtype) == ((10,), torch.float64)
    assert torch.equal(copied.to_local(), part(parameter).double())
    local(parameter).fill_(7)
    assert not bool((copied.to_local() == 7).all())
    # torch.distributed.checkpoint goes by these when it loads onto another number of processes.
    (item,) = sharded_checkpoint.planner_helpers._create_write_items("x", copied)
    assert item.tensor_data.chunk.offsets == torch.Size([3 * rank])
    assert item.tensor_data.size == torch.Size([10])


def test_an_average_that_lies_flat_is_exported_in_its_shape(tmp_path):
    model, other = tiny_run.llama(seed=1), tiny_run.llama(seed=2)
    folder = tmp_path / STATE_FOLDER
    flat = {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}
    sharded_checkpoint.save(flat, checkpoint_id=folder, no_dist=True)
    about = {"mode": "full", "updates": 3, "global_step": 3}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    (folder / "average.json").write_text(json.dumps({**about, "shapes": shapes}))
    put_average(other, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


def test_a_checkpoint_of_other_processes_is_refused(tmp_path):
    check_processes(str(tmp_path), 3, {})
    (tmp_path / "global_step3").mkdir()
    for rank in range(2):
        (tmp_path / "global_step3" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_processes(str(tmp_path), 2, {})
    check_processes(str(tmp_path), 3, {"checkpoint": {"load_universal": True}})
    with pytest.raises(ValueError, match=r"written by 2 processes, .* on as many, not on 3: start 2"):
        check_processes(str(tmp_path), 3, {"checkpoint": {}})


def test_groups_of_weights_count_their_own_steps():
    class Engine:
        basic_optimizer = torch.optim.AdamW(
            [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)], foreach=False
        )

    parameters = [group["params"][0] for group in Engine.basic_optimizer.param_groups]
    shared = torch.tensor(3.0)  # as DeepSpeed loads a universal checkpoint
    for parameter in parameters:
        parameter.grad = torch.ones(2)
        moments = {name: torch.zeros(2) for name in ("exp_avg", "exp_avg_sq")}
        Engine.basic_optimizer.state[parameter] = {"step": shared, **moments}
    separate_steps(Engine)
    Engine.basic_optimizer.step()
    assert [float(Engine.basic_optimizer.state[p]["step"]) for p in parameters] == [4.0, 4.0]
    assert torch.equal(*parameters)


def test_the_processor_is_not_asked_of_deepspeed_where_it_would_take_the_accelerator(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(ValueError, match="use_cpu=True does not keep DeepSpeed from the accelerator"):
        _ = tiny_run.config(tmp_path).device


def test_before_training_a_sharded_average_scores_as_the_base():
    """Where the trainer asks for the teacher's head before there are shards (teacher_mixture="pmi")."""
    model = get_peft_model(tiny_run.llama(), tiny_run.lora())
    ids = torch.tensor([[5, 6, 7]])
    teacher = make_teacher(model, teacher="self", ema="merged", decay=0.5, sharded=True)
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
    tiny_run.perturb(model)
    with teacher.scoring(model) as scorer:
        assert torch.equal(scorer(ids).logits, expected)
