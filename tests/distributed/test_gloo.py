"""Vocabulary-parallel heads over gloo: 1 to 4 processes are one process, a model cut by transformers too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import run_module

pytest.importorskip("transformers", minversion="5.21")

from tests.distributed.gloo_worker import CASES, PLANS, PROCESSES, load, loss_of_head, options_of, problem_of
from tests.distributed.slices import V, joined, loss_of
from tests.distributed.test_slices import assert_same, exact_and_natives
from tests.support import assert_accurate
from unisd_kernels import LMHead


def work(folder: Path, *arguments: str) -> None:
    run_module("tests.distributed.gloo_worker", folder, *arguments, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one run of the four processes saved, for all tests."""
    folder = tmp_path_factory.mktemp("gloo")
    work(folder)
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """The same with every plan for both models."""
    folder = tmp_path_factory.mktemp("everything")
    work(folder, "everything")
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    return saved(folder)


def saved(folder: Path) -> list[dict]:
    """What each process saved."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.parametrize("ranks", range(1, PROCESSES + 1))
@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(found, ranks, name):
    parts = joined([each["losses"][ranks, name] for each in found[:ranks]])
    dtype, problem = CASES[name][0], problem_of(name)
    options = options_of(name)
    if dtype == torch.float64:
        assert_same(parts, loss_of(problem, **options), 1e-12)
        return
    del options["impl"]
    exact, native = exact_and_natives(problem, dtype, options)
    for field, value in exact.items():
        if value.dtype != torch.bool:
            assert_accurate(f"{name}, {field}", parts[field], value, [each[field] for each in native])


OF_PLANS = [f", {name}" for name in PLANS]


@pytest.mark.parametrize(
    ("kind", "plan", "of"),
    [
        *(("untied", plan, "folder") for plan in ("", *OF_PLANS)),
        ("tied", "", "folder"),
        *(pytest.param("tied", plan, "everything", marks=pytest.mark.exhaustive) for plan in OF_PLANS),
    ],
)
def test_a_model_that_a_tp_plan_has_cut_trains_as_on_one_process(request, kind, plan, of):
    """Two steps: losses and all weights; the slices are DTensor's, of 1009 rows over four ranks. The head by
    transformers' own plan (`colwise_gather_output`), by `colwise_rep`, and cut alone."""
    folder = request.getfixturevalue(of)
    found, alone = saved(folder), torch.load(folder / "alone.pt", weights_only=False)[kind]
    kind += plan
    assert alone["slice"] is None
    assert [each[kind]["slice"] for each in found] == [(0, 253), (253, 253), (506, 253), (759, 250)]
    for each in found:
        assert each[kind]["losses"] == found[0][kind]["losses"]
        torch.testing.assert_close(each[kind]["losses"], alone["losses"], rtol=1e-10, atol=0.0)
        assert each[kind]["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(each[kind]["weights"][name], weight, rtol=0.0, atol=1e-10, msg=name)
    assert alone["losses"][0] != alone["losses"][1]


@pytest.mark.parametrize("name", ["replicated, ('dp', 'tp')", "replicated, None", "in shards", "gathered"])
def test_a_mesh_of_two_dimensions(folder, found, name):
    """The slice is of the dimension of tensor parallelism, and the other ranks' tokens stay out of it."""
    assert found[0]["meshes"]["placements"] == ["_StridedShard", "Shard"]
    whole = load(f"{folder}/untied").lm_head.weight.detach()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64) if name.startswith("replicated") else None
    for rank, each in enumerate(found):
        seen, copy = each["meshes"][name], rank // 2
        start, weight = seen["slice"]
        rows = slice(*((0, 505) if rank % 2 == 0 else (505, V)))
        assert start == rows.start
        assert torch.equal(weight, whole[rows])
        assert bias is None or torch.equal(seen["bias"], bias[rows])
        assert seen["ranks"] == [2 * copy, 2 * copy + 1]
        head = LMHead(whole.clone().requires_grad_(), bias)
        loss, gradient = loss_of_head(head, copy)
        torch.testing.assert_close(seen["loss"], loss, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(seen["hidden"], gradient, rtol=0.0, atol=1e-13)
        if seen["weight"] is not None:
            torch.testing.assert_close(seen["weight"], head.weight.grad[rows], rtol=0.0, atol=1e-13)


def test_a_cut_head_is_checked_against_the_models_own_logits(found):
    """On all columns, so with one verdict on all ranks."""
    messages = {each["scaled"] for each in found}
    assert len(messages) == 1
    assert "A logit_scale of 1.7 explains it" in messages.pop()


@pytest.mark.exhaustive
def test_a_head_under_fsdp_is_gathered(tmp_path):
    """Its ranks have other tokens: their slices are not of one softmax."""
    work(tmp_path, "fsdp")
    assert saved(tmp_path) == [{"shape": (1009, 16), "group": None, "is": "DTensor"}] * PROCESSES
