"""A model in slices of its layers, on two processes that share each row, trains as on one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.processes import run_module

pytest.importorskip("transformers", minversion="5.21")

from datasets import Dataset

from tests.trainer import tiny_run
from tests.trainer.tensor_parallel_worker import RUNS
from unisd.parallelism import check_parallelism, data_parallel_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    run_module("tests.trainer.tensor_parallel_worker", folder, timeout=420)
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in ("alone", "rank0", "rank1")}


@pytest.mark.parametrize("run", RUNS)
def test_steps_are_those_of_one_process(found, run):
    """Losses, norms of gradients and weights of two steps; rows are drawn in one order on both."""
    alone = found["alone"][run]
    assert alone["slice"] == (64, 32)
    for rank in ("rank0", "rank1"):
        seen = found[rank][run]
        assert seen["slice"] == (32, 32)
        assert len(seen["losses"]) == 2
        torch.testing.assert_close(seen["losses"], alone["losses"], rtol=1e-5, atol=0.0)
        torch.testing.assert_close(seen["norms"], alone["norms"], rtol=1e-5, atol=0.0)
        # Adam's first steps go by signs: where a gradient is rounding, they may differ.
        moved = [(seen["weights"][name] - weight).abs() for name, weight in alone["weights"].items()]
        far = torch.cat([(each > 1e-4).flatten() for each in moved]).float().mean()
        assert far < 1e-3


def test_processes_that_share_rows_draw_the_same_tokens(found):
    assert found["rank0"]["drawn"] == found["rank1"]["drawn"]
    assert len({tuple(row) for row in found["rank0"]["drawn"][0]}) > 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("average", "ema='full' keeps weights of its own"),
        ("copy", "teacher='base' keeps weights of its own"),
        ("adapter", "PEFT's layers take whole weights"),
        ("window", "batch_statistics='global' needs rows of its own"),
    ],
)
def test_what_does_not_work_is_refused(found, name, says):
    for rank in ("rank0", "rank1"):
        assert says in found[rank][name]
        assert "2 processes share each row" in found[rank][name]


def test_what_else_is_refused():
    shared = SimpleNamespace(parallelism_config=SimpleNamespace(non_data_parallel_size=2), num_processes=6)
    assert data_parallel_processes(shared) == 3
    assert data_parallel_processes(SimpleNamespace(num_processes=6)) == 6
    given = {"batch_statistics": "micro", "use_vllm": False, "gradient_accumulation_steps": 2}
    stream = Dataset.from_list(tiny_run.rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match="use_vllm=True draws completions for every process by itself"):
        check_parallelism(SimpleNamespace(**given | {"use_vllm": True}), shared)
    with pytest.raises(ValueError, match="TRL repeats the rows of a streamed train_dataset"):
        check_parallelism(SimpleNamespace(**given), shared, None, stream)
    check_parallelism(SimpleNamespace(**given | {"gradient_accumulation_steps": 1}), shared, None, stream)
