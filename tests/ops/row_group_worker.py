"""Four ranks that hold the rows of one batch: each makes every call of `CASES` and saves what it got.

    python -m tests.ops.row_group_worker FOLDER

forks the four, once everything is imported."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import start_processes

from tests.support import Problem, make_problem
from unisd_kernels import agreement_weights, unisd_loss
from unisd_kernels.batch import Batch
from unisd_kernels.ops.quantile import linear_quantile

RANKS = 4
LENGTHS = (3, 0, 5, 4, 1, 7, 2)
EVERYTHING = {"temperature": 0.7, "agreement_gamma": 2.0, "contrastive_weight": 0.3, "feature_weight": 0.2}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        split: for each rank, (sequence, first row, last row + 1) of what it holds, in the order of the whole batch.
        lengths: rows of each sequence.
        options: of `unisd_loss`.
        problem: of `make_problem`.
        shared: ranks of one sequence group: 0 for whole sequences, 2 of 4 for a mesh.
        dtype: of the call; the problem is the same.
    """

    split: tuple[tuple[tuple[int, int, int], ...], ...]
    lengths: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    problem: tuple[tuple[str, Any], ...] = ()
    shared: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def size(self) -> int:
        return len(self.split)

    def whole(self) -> Problem:
        return make_problem(lengths=self.lengths, hidden_size=8, vocab_size=53, **dict(self.problem)).to(self.dtype)

    def rows(self, rank: int) -> torch.Tensor:
        """Rows of the batch on a rank."""
        starts = [0, *itertools.accumulate(self.lengths)]
        parts = [torch.arange(starts[b] + first, starts[b] + last) for b, first, last in self.split[rank]]
        return torch.cat([torch.zeros(0, dtype=torch.long), *parts])

    def part(self, rank: int) -> Problem:
        """The problem of a rank: its rows, the same heads."""
        whole, rows = self.whole(), self.rows(rank)
        lengths = torch.tensor([0, *(last - first for _, first, last in self.split[rank])])
        fields = {
            name: None if getattr(whole, name) is None else getattr(whole, name)[rows]
            for name in ("teacher_hidden", "negative_hidden", "token_weights", "target_ids")
        }
        return replace(
            whole,
            student_hidden=whole.student_hidden.detach()[rows].requires_grad_(),
            auxiliary_hidden=tuple(view[rows] for view in whole.auxiliary_hidden),
            cu_seqlens=lengths.cumsum(0).int(),
            **fields,
        )


def of_whole_sequences(owners: list[list[int]], lengths: tuple[int, ...] = LENGTHS) -> tuple:
    return tuple(tuple((b, 0, lengths[b]) for b in owned) for owned in owners)


def of_split_sequences(size: int, lengths: tuple[int, ...] = LENGTHS) -> tuple:
    """Pieces of every sequence on every rank, as even as they go: a short one leaves ranks without a row of it."""
    return tuple(
        tuple((b, length * rank // size, length * (rank + 1) // size) for b, length in enumerate(lengths))
        for rank in range(size)
    )


def settings(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple({**EVERYTHING, **options}.items())


_OWNERS = {1: [[0, 1, 2, 3, 4, 5, 6]], 2: [[0, 1, 2, 3, 4], [5, 6]], 3: [[0, 1], [2], [3, 4, 5, 6]]}
_MESH = tuple(
    tuple((b, LENGTHS[b] * part // 2, LENGTHS[b] * (part + 1) // 2) for b in owned)
    for owned in ([0, 1, 2], [3, 4, 5, 6])
    for part in (0, 1)
)
_TRAINED = (("frozen_head", False), ("bias", True))


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    # Every mechanism at once, by what decides which sums and quantiles there are.
    for size, normalization, level, clip, frozen in itertools.product(
        (1, 2, 3), ("sequence", "token"), ("token", "sequence"), (0.0, 0.6), (True, False)
    ):
        if size < 3 and not clip:
            continue
        options = settings(normalization=normalization, agreement=level, clip_quantile=clip or None, beta=0.3)
        problem = (("frozen_head", frozen), ("negative", not frozen), ("token_weights", True))
        found[f"{size} ranks, {normalization}, {level}, clip {clip}, frozen {frozen}"] = Case(
            of_whole_sequences(_OWNERS[size]), LENGTHS, options, problem
        )
        if size > 1:
            found[f"{size} ranks share, {normalization}, {level}, clip {clip}, frozen {frozen}"] = Case(
                of_split_sequences(size), LENGTHS, options, problem, shared=size
            )
    both = settings(clip_quantile=0.6, agreement="token")
    for name, owners in (("no sequence", [[0, 1, 2], [], [3, 4, 5], [6]]), ("no row", [[0], [1], [2, 3, 4, 5], [6]])):
        found[f"a rank with {name}"] = Case(of_whole_sequences(owners), LENGTHS, both, _TRAINED)
        token = settings(clip_quantile=0.6, normalization="token", weight_normalization="weighted")
        found[f"a rank with {name}, by token"] = Case(of_whole_sequences(owners), LENGTHS, token)
    nothing = (0, 0, 0)
    found["all masked"] = Case(of_whole_sequences([[0], [1], [2], []], nothing), nothing, both, _TRAINED)
    found["all masked, shared"] = Case(of_split_sequences(4, nothing), nothing, both, shared=4)
    for level in ("token", "sequence"):
        for normalization in ("token", "sequence"):
            options = settings(clip_quantile=0.7, agreement=level, normalization=normalization, beta=1.0)
            found[f"mesh of 2 x 2, {level}, {normalization}"] = Case(_MESH, LENGTHS, options, _TRAINED, shared=2)
            given = settings(agreement=level, normalization=normalization, num_items=11.0)
            found[f"num_items, {level}, {normalization}"] = Case(of_whole_sequences(_OWNERS[3]), LENGTHS, given)
    by_total = settings(normalization="token", weight_normalization="weighted", weight_total=9.5, num_items=11)
    found["weight_total"] = Case(of_whole_sequences(_OWNERS[2]), LENGTHS, by_total)
    unused = settings(divergence_weight=0.0, clip_quantile=0.6)
    found["no divergence"] = Case(of_whole_sequences(_OWNERS[3]), LENGTHS, unused)
    plain = settings(clip_quantile=0.6, agreement="token")
    found["float32"] = Case(of_whole_sequences(_OWNERS[3]), LENGTHS, plain, _TRAINED, dtype=torch.float32)
    found["bfloat16"] = Case(of_split_sequences(3), LENGTHS, plain, _TRAINED, shared=3, dtype=torch.bfloat16)
    return found


CASES = cases()


def call(problem: Problem, options: dict[str, Any], function=unisd_loss) -> dict[str, Any]:
    """The result of a call, and its gradients."""
    result = function(**problem.arguments(), **options)
    gradients = torch.autograd.grad(result.loss, problem.leaves) if problem.leaves else ()
    return {"result": tuple(result), "gradients": gradients}


class Traffic:
    """Counts what is sent in its `with` block: messages, and bytes of this rank's part of each."""

    def __enter__(self) -> Traffic:
        self.sizes: list[int] = []
        self._send = distributed.all_gather

        def counted(out: list[torch.Tensor], values: torch.Tensor, group: Any = None) -> None:
            self.sizes.append(values.numel() * values.element_size())
            self._send(out, values, group=group)

        distributed.all_gather = counted
        return self

    def __exit__(self, *_: object) -> None:
        distributed.all_gather = self._send


def refusals(rank: int, groups: dict[int, Any]) -> dict[str, str]:
    """What each rank is told, when they do not call alike."""
    case = CASES["a rank with no row"]
    two = CASES["2 ranks, token, token, clip 0.6, frozen True"]
    changed: dict[str, tuple[Case, int, dict[str, Any]]] = {
        "settings": (case, 4, {"row_group": groups[4], "agreement_gamma": 3.0 if rank == 2 else 2.0}),
        "reference": (case, 4, {"row_group": groups[4], "impl": "reference"}),
        "sequences": (case, 4, {"sequence_group": groups[4]}),
        "kind": (case, 4, {"row_group": "world"}),
        "outside": (two, 2, {"row_group": groups[2]}),
    }
    said = {}
    for name, (of, size, options) in changed.items():
        if name != "outside" or rank >= size:  # ranks 0 and 1 are in it
            try:
                unisd_loss(**of.part(rank % size).arguments(), **{**dict(of.options), **options})
            except (ValueError, TypeError) as error:
                said[name] = f"{type(error).__name__}: {error}"
    return said


def parts(rank: int, groups: dict[int, Any]) -> dict[str, torch.Tensor]:
    """A quantile, a total and sums over sequences of known values, on every rank."""
    case = CASES["all masked, shared"]
    count = (5, 0, 9, 2)[rank]
    values = torch.randn(count, generator=torch.Generator().manual_seed(rank))
    rows = Batch.of(torch.tensor([0, count]), count, groups[4])
    shared = Batch.of(torch.zeros(len(case.lengths) + 1, dtype=torch.int32), 0, None, groups[4])
    sums = torch.full((2, 3), 0.1 * (rank + 1))
    return {
        "values": values,
        "quantile": linear_quantile(rows.gathered(values), 0.95),
        "total": rows.total(values),
        "sums": shared.over_sequences(sums),
        "num_sequences": torch.tensor([rows.num_sequences, shared.num_sequences]),
    }


def compiled(rank: int, group: Any) -> dict[str, Any]:
    case = CASES["2 ranks, token, token, clip 0.6, frozen False"]

    def function(**arguments: Any) -> Any:
        return unisd_loss(**{**arguments, "student_hidden": arguments["student_hidden"] * 1.0}, row_group=group)

    graphs = torch.compile(function, backend="eager")
    return call(case.part(rank), dict(case.options), graphs)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    groups = {size: distributed.new_group(list(range(size))) for size in range(1, RANKS + 1)}
    pairs = [distributed.new_group([2 * i, 2 * i + 1]) for i in range(2)]
    out: dict[str, Any] = {"cases": {}, "traffic": {}, "parts": parts(rank, groups)}
    for name, case in CASES.items():
        if rank >= case.size:
            continue
        given = {"row_group": groups[case.size]}
        if case.shared == case.size:
            given = {"sequence_group": groups[case.size]}
        elif case.shared:
            given["sequence_group"] = pairs[rank // 2]
        problem = case.part(rank)
        with Traffic() as traffic:
            result = unisd_loss(**problem.arguments(), **dict(case.options), **given)
        sent = list(traffic.sizes)
        with traffic:
            gradients = torch.autograd.grad(result.loss, problem.leaves)
        assert traffic.sizes == []
        out["cases"][name] = {"result": tuple(result), "gradients": gradients}
        out["traffic"][name] = sent
        if result.auxiliary_logprobs is not None:
            level = dict(case.options).get("agreement", "token")
            weights = agreement_weights(
                result.auxiliary_logprobs, problem.cu_seqlens, level=level, gamma=2.0, **given
            ).weights
            out["cases"][name]["agreement"] = weights
    if rank < 2:
        out["compiled"] = compiled(rank, groups[2])
    out["refusals"] = refusals(rank, groups)
    torch.save(out, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def main(folder: str) -> None:
    torch.compile(torch.neg, backend="eager")(torch.ones(1))  # imports the compiler once, before the fork
    start_processes(process, (folder,), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
