"""Ranks that hold other rows of one batch: what they get is what one process gets of the whole batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.ops.row_group_worker import CASES, RANKS, Case, call
from tests.processes import run_module
from tests.support import max_error
from unisd_kernels import UniSDLoss, unisd_loss
from unisd_kernels.batch import Batch

SCALARS = ("loss", "divergence_loss", "contrastive_loss", "feature_loss")
# Relative to the largest entry. In float32 and bfloat16 one process makes the same products of other shapes.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes got for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_module("tests.ops.row_group_worker", folder, timeout=600, CUDA_VISIBLE_DEVICES="")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def expected(case: Case) -> dict[str, Any]:
    """The dense definition on the whole batch; in other dtypes than float64 the fast path on it."""
    options = dict(case.options)
    with pytest.warns(UserWarning, match="no rows") if not sum(case.lengths) else nullcontext():
        return call(case.whole(), {**options, "impl": "reference" if case.dtype == torch.float64 else None})


def assert_close(name: str, found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == exact.shape, name
    if exact.dtype == torch.bool:
        assert torch.equal(found, exact), name
        return
    scale = float(exact.abs().max()) if exact.numel() else 1.0
    error = max_error(found.detach(), exact)
    assert error <= TOLERANCE[dtype] * max(scale, 0.1), f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    case = CASES[name]
    one, found = expected(case), [ranks[rank]["cases"][name] for rank in range(case.size)]
    whole, parts = UniSDLoss(*one["result"]), [UniSDLoss(*each["result"]) for each in found]
    for field in SCALARS:  # shares that add up
        total = sum(getattr(part, field).double() for part in parts)
        assert_close(field, total, getattr(whole, field).detach(), case.dtype)
    places = [case.rows(rank) for rank in range(case.size)]
    by_sequence = dict(case.options).get("agreement") == "sequence"
    for field in UniSDLoss._fields:
        exact = getattr(whole, field)
        if field in SCALARS or exact is None or (field == "disagreement" and by_sequence):
            continue
        for part, rows in zip(parts, places, strict=True):
            assert_close(field, getattr(part, field), exact.detach()[..., rows], case.dtype)
    hidden, *shared = one["gradients"]
    for each, rows in zip(found, places, strict=True):
        assert_close("gradient of the rows", each["gradients"][0], hidden[rows], case.dtype)
    for i, exact in enumerate(shared, 1):
        total = sum(each["gradients"][i].double() for each in found)
        assert_close(f"gradient {i} of the head", total.to(exact.dtype), exact, case.dtype)


def test_the_groups_matter(ranks: list[dict[str, Any]]) -> None:
    """A rank alone gets other weights, another cap and another share."""
    name = "3 ranks, token, token, clip 0.6, frozen True"
    case = CASES[name]
    found = [UniSDLoss(*ranks[rank]["cases"][name]["result"]) for rank in range(3)]
    alone = [unisd_loss(**case.part(rank).arguments(), **dict(case.options)) for rank in range(3)]
    for field in ("loss", "weights"):
        for one, other in zip(found, alone, strict=True):
            assert float((getattr(one, field) - getattr(other, field)).detach().abs().max()) > 1e-3, field
    assert any(not torch.equal(one.clipped, other.clipped) for one, other in zip(found, alone, strict=True))


def test_agreement_weights_alone(ranks: list[dict[str, Any]]) -> None:
    """The public function gives the weights that the loss used, but for `token_weights`."""
    checked = 0
    for name, case in CASES.items():
        for rank in range(case.size):
            each = ranks[rank]["cases"][name]
            if "agreement" in each:
                given = case.part(rank).token_weights
                weights = each["agreement"] if given is None else each["agreement"] * given
                assert torch.equal(weights, UniSDLoss(*each["result"]).weights), name
                checked += weights.numel() > 0
    assert checked > 50


def test_every_rank_has_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    parts = [each["parts"] for each in ranks]
    values = torch.cat([part["values"] for part in parts])
    for part in parts:
        assert torch.equal(part["quantile"], torch.quantile(values, 0.95))
        assert torch.equal(part["total"], parts[0]["total"])
        assert float(part["total"]) == pytest.approx(float(values.double().sum()), rel=1e-6)
        assert torch.equal(part["sums"], parts[0]["sums"])
        assert torch.allclose(part["sums"], torch.ones(2, 3))
        assert part["num_sequences"].tolist() == [4, 3]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("3 ranks", "a rank", "mesh", "all"))])
def test_messages_and_bytes(name: str, ranks: list[dict[str, Any]]) -> None:
    """As docs/row-groups.md has them, whatever a rank holds."""
    case, options = CASES[name], dict(CASES[name].options)
    longest = max(case.rows(rank).numel() for rank in range(case.size))
    shared, by_token = bool(case.shared), options.get("agreement", "token") == "token"
    has_rows = sum(case.lengths) > 0
    weighted = options.get("weight_normalization", "weighted" if by_token else "count") == "weighted"
    for rank in range(case.size):
        sequences = len(case.split[rank])
        expected = [8, 8 * sequences] if shared else []
        expected += [24]
        if by_token:
            expected += [8 * longest] * has_rows
        elif shared:
            expected += [8 * 2 * sequences]  # sums of the log-probabilities of two views
        if weighted and options.get("normalization", "sequence") == "token":
            expected += [8]
        elif weighted and shared:
            expected += [8 * sequences]
        if options.get("clip_quantile"):
            expected += [8 * longest] * has_rows
        assert ranks[rank]["traffic"][name] == expected, rank


def test_between_two_graphs(ranks: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        compiled = ranks[rank]["compiled"]
        eager = ranks[rank]["cases"]["2 ranks, token, token, clip 0.6, frozen False"]
        for found, exact in zip(compiled["gradients"], eager["gradients"], strict=True):
            assert torch.equal(found, exact)


@pytest.mark.parametrize(
    ("name", "on", "message"),
    [
        ("settings", (0, 1, 2, 3), r"ValueError: rank 2 of row_group was called otherwise than rank 0"),
        ("reference", (0, 1, 2, 3), r"ValueError: impl='reference' knows one process only"),
        ("sequences", (0, 1, 2, 3), r"ValueError: the ranks of sequence_group have \[1, 1, 4, 1\] sequences"),
        ("kind", (0, 1, 2, 3), r"TypeError: row_group must be a torch.distributed.ProcessGroup or None, got str"),
        ("outside", (2, 3), r"ValueError: this process is not in row_group"),
    ],
)
def test_refusals(name: str, on: tuple[int, ...], message: str, ranks: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        if rank in on:
            with pytest.raises(AssertionError, match=message):
                raise AssertionError(ranks[rank]["refusals"][name])
        else:
            assert name not in ranks[rank]["refusals"]


def test_without_a_group_nothing_is_sent() -> None:
    cu_seqlens = torch.tensor([0, 2, 5])
    batch, values = Batch.of(cu_seqlens, 5), torch.randn(5)
    assert (batch.num_rows, batch.num_sequences, batch.lengths.tolist()) == (5, 2, [2, 3])
    assert batch.gathered(values) is values
    assert torch.equal(batch.total(values), values.sum())
    assert batch.over_sequences(values) is values
