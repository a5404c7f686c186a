"""The counts behind docs/tensor-parallel.md: a float64 problem in R shards, and what the page says of the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from bench.cases import UNISD_STAR, Case
from bench.expected import Assumptions, Model, _spans
from bench.tensor_parallel import (
    HEADS,
    LAYOUTS,
    OPERATIONS,
    RANKS,
    SHARDED,
    Links,
    Plan,
    fastest,
    headline_plan,
    report,
    rows_for_the_head,
    wire_dominates_from,
)
from unisd_kernels import LMHead, reference
from unisd_kernels.config import LossConfig, LossInputs
from unisd_kernels.reference.agreement import disagreement, token_weight
from unisd_kernels.reference.loss import reduce_per_token

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tensor-parallel.md"
ONE_RING = Links(rings=1)
TAU = 0.7
Parts = list[torch.Tensor]


@dataclass
class Group:
    """R ranks in a ring; what each collective sends, by name: kind, calls, and elements of all ranks together."""

    ranks: int
    log: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    def _record(self, what: str, kind: str, sent: int) -> None:
        _, calls, before = self.log.get(what, (kind, 0, 0))
        self.log[what] = (kind, calls + 1, before + sent)

    def _reduced(self, parts: Parts, combine: Callable[..., torch.Tensor]) -> tuple[Parts, int]:
        """Piece i of a tensor starts on rank i, and every rank on its way adds its own: R - 1 steps a piece."""
        pieces = [list(part.flatten().tensor_split(self.ranks)) for part in parts]
        done, sent = [], 0
        for i in range(self.ranks):
            running = pieces[i][i]
            for step in range(1, self.ranks):
                sent += running.numel()
                running = combine(pieces[(i + step) % self.ranks][i], running)
            done.append(running)
        return done, sent

    def all_reduce(self, what: str, parts: Parts, combine: Callable[..., torch.Tensor] = torch.add) -> torch.Tensor:
        pieces, sent = self._reduced(parts, combine)
        sent += sum(piece.numel() * (self.ranks - 1) for piece in pieces)
        self._record(what, "all-reduce", sent)
        return torch.cat(pieces).view_as(parts[0])

    def reduce_scatter(self, what: str, parts: Parts) -> Parts:
        pieces, sent = self._reduced(parts, torch.add)
        self._record(what, "reduce-scatter", sent)
        return [piece.view(-1, *parts[0].shape[1:]) for piece in pieces]

    def all_gather(self, what: str, parts: Parts, dim: int = 0) -> torch.Tensor:
        self._record(what, "all-gather", sum(part.numel() * (self.ranks - 1) for part in parts))
        return torch.cat(parts, dim)


class Problem(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    negative: torch.Tensor
    auxiliary: Parts
    weight: torch.Tensor
    targets: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, case: Case, scale: float = 1.0) -> Problem:
        generator = torch.Generator().manual_seed(case.num_rows + case.vocab_size)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden = [normal(case.num_rows, case.hidden_size) for _ in range(6)]
        weight = scale * normal(case.vocab_size, case.hidden_size)
        targets = torch.randint(0, case.vocab_size, (case.num_rows,), generator=generator)
        bounds = torch.tensor([0, case.num_rows // 3, case.num_rows])
        return cls(hidden[0], hidden[1], hidden[2], hidden[3:], weight, targets, bounds)


class Found(NamedTuple):
    """[N] statistics by name, and gradients of the loss; None where there are none."""

    statistics: dict[str, torch.Tensor]
    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """Not the reference's: a shard may have no column."""
    return hidden @ weight.T / temperature


def loss_terms(
    problem: Problem, weights: torch.Tensor, divergence: torch.Tensor, student: torch.Tensor, others: Parts
) -> torch.Tensor:
    """Divergence and contrastive term of UniSD*, each weighted; linear in the rows."""
    hinge = reference.contrastive_hinge(student, *others, UNISD_STAR["contrastive_margin"])
    return torch.stack(
        [
            reduce_per_token(divergence, problem.bounds, "sequence", weights, "weighted"),
            UNISD_STAR["contrastive_weight"] * reduce_per_token(hinge, problem.bounds, "sequence"),
        ]
    )


def feature_term(problem: Problem, distance: torch.Tensor) -> torch.Tensor:
    return UNISD_STAR["feature_weight"] * reduce_per_token(distance, problem.bounds, "sequence")


class Shards:
    """The vocabulary layout as the page describes it; and the logits layout."""

    def __init__(self, plan: Plan, problem: Problem) -> None:
        self.plan, self.problem, self.group = plan, problem, Group(plan.ranks)
        limits = [min(rank * plan.columns, plan.case.vocab_size) for rank in range(plan.ranks + 1)]
        self.offsets = limits[:-1]
        self.weights = [problem.weight[a:b] for a, b in pairwise(limits)]

    def _shifted(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maximum of a shard (-inf: it has no column) and logits relative to it."""
        top = logits.amax(-1) if logits.shape[1] else torch.full(logits.shape[:1], -math.inf, dtype=logits.dtype)
        return top, logits - top.unsqueeze(-1)

    def _target(self, rank: int, logits: torch.Tensor, targets: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        column = targets - self.offsets[rank]
        mine = (column >= 0) & (column < logits.shape[1])
        if not logits.shape[1]:
            return torch.zeros_like(top)
        value = logits.gather(-1, column.clamp(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1) - top
        return torch.where(mine, value, torch.zeros_like(top))

    def _view_sums(self, shifted: torch.Tensor, move: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """S and E relative to the shard's maximum, then to the common one, which is `-move` higher."""
        total, entropy = shifted.exp().sum(-1), (shifted.exp() * shifted).sum(-1)
        factor = move.exp()
        return factor * total, factor * (entropy + move.nan_to_num(neginf=0.0) * total)

    def score(self, views: list[tuple[torch.Tensor, float]]) -> Parts:
        """Log-probabilities, then log-sum-exps, of scored views: one pass over the logits, two all-reduces."""
        problem = self.problem
        logits = [[logits_of(hidden, weight, tau) for hidden, tau in views] for weight in self.weights]
        local = [[self._shifted(view) for view in rank] for rank in logits]
        tops = [torch.stack([top for top, _ in rank]) for rank in local]
        top = self.group.all_reduce("views: maxima", tops, torch.maximum)
        sums = []
        for rank, (shares, own) in enumerate(zip(logits, local)):
            totals = [self._view_sums(shifted, t - top[v])[0] for v, (t, shifted) in enumerate(own)]
            found = [self._target(rank, view, problem.targets, top[v]) for v, view in enumerate(shares)]
            sums.append(torch.stack([*totals, *found]))
        total, target = self.group.all_reduce("views: sums", sums).chunk(2)
        return [*(target - total.log()), *(top + total.log())]

    def pair(self, rows: slice) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Statistics of a block, and log-probabilities of each shard for the gradient."""
        full, jsd = self.plan.case.operation == "unisd_loss", self.plan.jsd
        hidden = (self.problem.student[rows], self.problem.teacher[rows])
        logits = [[logits_of(view, weight, TAU) for view in hidden] for weight in self.weights]
        local = [[self._shifted(view) for view in rank] for rank in logits]
        top = self.group.all_reduce(
            "pair: maxima", [torch.stack([t for t, _ in rank]) for rank in local], torch.maximum
        )
        names = ["S_s", "S_t"] + ["X"] * (not jsd) + ["t_s", "t_t", "E_s", "E_t"] * full
        sums = []
        for rank, (shares, own) in enumerate(zip(logits, local)):
            moves = [t - top[v] for v, (t, _) in enumerate(own)]
            found = {}
            for v, name in enumerate("st"):
                found[f"S_{name}"], found[f"E_{name}"] = self._view_sums(own[v][1], moves[v])
                found[f"t_{name}"] = self._target(rank, shares[v], self.problem.targets[rows], top[v])
            (student, teacher), (move_s, move_t) = (own[0][1], own[1][1]), moves
            moved = (move_t - move_s).nan_to_num() * teacher.exp().sum(-1)
            found["X"] = move_t.exp() * ((teacher.exp() * (teacher - student)).sum(-1) + moved)
            sums.append(torch.stack([found[name] for name in names]))
        common = dict(zip(names, self.group.all_reduce("pair: sums", sums)))
        lse = [top[v] + common[f"S_{name}"].log() for v, name in enumerate("st")]
        shares_of = [(s - lse[0].unsqueeze(-1), t - lse[1].unsqueeze(-1)) for s, t in logits]
        if not jsd:
            found = {"divergence": common["X"] / common["S_t"] - common["S_t"].log() + common["S_s"].log()}
        else:
            found = self._jsd(shares_of)
        if full:
            for name in ("student", "teacher"):
                total = common[f"S_{name[0]}"]
                found[f"{name}_logprobs"] = common[f"t_{name[0]}"] - total.log()
                found[f"{name}_entropy"] = total.log() - common[f"E_{name[0]}"] / total
        return found, shares_of

    def _jsd(self, shares: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        sums = []
        for student, teacher in shares:
            mixture = torch.logaddexp(student, teacher) + math.log(0.5)
            kls = [(view.exp() * (view - mixture)).sum(-1) for view in (teacher, student)]
            sums.append(torch.stack(kls))
        of_teacher, of_student = self.group.all_reduce("pair: second_sums", sums)
        return {"divergence": 0.5 * (of_teacher + of_student), "student part": of_student}

    def logit_gradient(
        self, rank: int, rows: slice, share: tuple[torch.Tensor, torch.Tensor], found: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Of the rows' loss with respect to the shard's student logits."""
        student, teacher = share
        if self.plan.jsd:
            mixture = torch.logaddexp(student, teacher) + math.log(0.5)
            return 0.5 * student.exp() * (student - mixture - found["student part"].unsqueeze(-1))
        gradient = found["of divergence"].unsqueeze(-1) * (student.exp() - teacher.exp())
        columns = self.offsets[rank] + torch.arange(student.shape[1])
        hot = (columns == self.problem.targets[rows].unsqueeze(-1)).to(gradient)
        return gradient + found["of logprob"].unsqueeze(-1) * (hot - student.exp())

    def loss(self) -> Found:
        plan, problem, group = self.plan, self.problem, self.group
        self.gather_hidden()
        weights, negative, statistics = self.agreement()
        split = plan.share.rows(plan.design)
        size = plan.case.num_rows
        partial = [torch.zeros_like(problem.student) for _ in self.weights]
        weight_parts = [torch.zeros_like(weight) for weight in self.weights]
        blocks: list[dict[str, torch.Tensor]] = []
        start = 0
        for block in (b for chunk in _spans(size, split.chunk) for b in _spans(chunk, split.block)):
            rows = slice(start, start + block)
            start += block
            found, shares = self.pair(rows)
            blocks.append(dict(found))
            found |= self.row_weights(rows, found, weights, negative)
            for rank, share in enumerate(shares):
                gradient = self.logit_gradient(rank, rows, share, found) / TAU
                partial[rank][rows] = gradient @ self.weights[rank]
                weight_parts[rank] += gradient.T @ problem.student[rows]
        statistics |= {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        statistics.pop("student part", None)
        if plan.split_rows:
            padded = [
                torch.cat([part, part.new_zeros(plan.ranks * plan.rows - size, part.shape[1])]) for part in partial
            ]
            hidden = torch.cat(group.reduce_scatter("dh", padded))[:size]
        else:
            hidden = group.all_reduce("dh", partial)
        return Found(statistics, hidden, torch.cat(weight_parts))

    def agreement(self) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        problem, case = self.problem, self.plan.case
        if case.operation != "unisd_loss":
            return torch.ones(case.num_rows, dtype=torch.float64), None, {}
        views = [(hidden, 1.0) for hidden in problem.auxiliary] + [(problem.negative, TAU)]
        logprobs = self.score(views)[: len(views)]
        auxiliary = torch.stack(logprobs[:-1])
        weights = reference.agreement_weights(auxiliary, problem.bounds, gamma=UNISD_STAR["agreement_gamma"]).weights
        return weights, logprobs[-1], {"auxiliary_logprobs": auxiliary, "negative_logprobs": logprobs[-1]}

    def row_weights(
        self, rows: slice, found: dict[str, torch.Tensor], weights: torch.Tensor, negative: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Gradient of the loss with respect to D and the student's log-probability: replicated, nothing exchanged."""
        divergence = torch.zeros_like(weights).index_copy(0, torch.arange(rows.start, rows.stop), found["divergence"])
        if negative is None:
            return {
                "of divergence": torch.ones_like(divergence[rows]),
                "of logprob": torch.zeros_like(divergence[rows]),
            }
        student, teacher = torch.zeros_like(divergence), torch.zeros_like(divergence)
        student[rows], teacher[rows] = found["student_logprobs"], found["teacher_logprobs"]
        leaves = (divergence.requires_grad_(), student.requires_grad_())
        total = loss_terms(self.problem, weights, *leaves, [teacher, negative]).sum()
        of_divergence, of_logprob = torch.autograd.grad(total, leaves)
        return {"of divergence": of_divergence[rows], "of logprob": of_logprob[rows]}

    def gather_hidden(self) -> None:
        """With hidden states split by rows."""
        if not self.plan.split_rows:
            return
        case = self.plan.case
        pair = [self.problem.student, self.problem.teacher] if self.plan.is_loss else [self.problem.student]
        scored = [*self.problem.auxiliary, self.problem.negative] if case.operation == "unisd_loss" else []
        for hidden in (*pair, *scored):
            gathered = self.group.all_gather("hidden states", row_parts(self.plan, hidden))
            assert torch.equal(gathered[: case.num_rows], hidden)

    def scoring(self) -> Found:
        self.gather_hidden()
        logprobs, logsumexp = self.score([(self.problem.student, 1.0)])
        return Found({"logprobs": logprobs, "logsumexp": logsumexp})

    def gathered_logits(self) -> Found:
        """The logits layout."""
        plan, problem = self.plan, self.problem
        self.gather_hidden()

        def gather(hidden: torch.Tensor, tau: float) -> torch.Tensor:
            parts = []
            for weight in self.weights:
                share = logits_of(hidden, weight, tau)
                parts.append(torch.nn.functional.pad(share, (0, plan.columns - share.shape[1]), value=-math.inf))
            return self.group.all_gather("logits", parts, dim=1)[:, : plan.case.vocab_size]

        if not plan.is_loss:
            logits = gather(problem.student, 1.0)
            logprobs = logits.log_softmax(-1).gather(-1, problem.targets.unsqueeze(-1)).squeeze(-1)
            return Found({"logprobs": logprobs, "logsumexp": logits.logsumexp(-1)})
        student, teacher = (gather(h, TAU).log_softmax(-1) for h in (problem.student, problem.teacher))
        gradient = (student.exp() - teacher.exp()).tensor_split(self.offsets[1:], dim=1)
        partial = [part @ weight / TAU for part, weight in zip(gradient, self.weights)]
        divergence = reference.divergence_from_log_probs(student, teacher, 0.0)
        weight = torch.cat([part.T @ problem.student / TAU for part in gradient])
        return Found({"divergence": divergence}, self.group.all_reduce("dh", partial), weight)


def row_parts(plan: Plan, values: torch.Tensor) -> Parts:
    """[N, ...] in R equal parts, the last ones padded with zeros."""
    padding = plan.ranks * plan.rows - values.shape[0]
    return list(torch.cat([values, values.new_zeros(padding, *values.shape[1:])]).split(plan.rows))


def by_rows(plan: Plan, problem: Problem) -> tuple[Found, Group]:
    """Layouts `head` and `replicated`: every rank does what the reference does, on its rows."""
    group, size, full = Group(plan.ranks), plan.case.num_rows, plan.case.operation == "unisd_loss"
    weight = problem.weight
    if plan.layout == "head":
        padded = weight.new_zeros(plan.ranks * plan.columns, weight.shape[1])
        padded[: weight.shape[0]] = weight
        weight = group.all_gather("W", list(padded.split(plan.columns)))[: weight.shape[0]]
    parts = [row_parts(plan, hidden) for hidden in (problem.student, problem.teacher, problem.negative)]
    targets, auxiliary = row_parts(plan, problem.targets), [row_parts(plan, hidden) for hidden in problem.auxiliary]

    def logprobs(hidden: torch.Tensor, rank: int, tau: float) -> torch.Tensor:
        return reference.linear_logprobs(hidden, LMHead(weight), targets[rank], tau).logprobs

    if not plan.is_loss:
        scores = [reference.linear_logprobs(h, LMHead(weight), y) for h, y in zip(parts[0], targets)]
        results = [torch.stack([score.logprobs, score.logsumexp], 1) for score in scores]
        found = group.all_gather("results", results)[:size] if not plan.split_rows else torch.cat(results)[:size]
        return Found({"logprobs": found[:, 0], "logsumexp": found[:, 1]}), group
    row_weights = torch.ones(size, dtype=torch.float64)
    if full:
        spreads = [
            disagreement(torch.stack([logprobs(view[rank], rank, 1.0) for view in auxiliary]), "variance", True)
            for rank in range(plan.ranks)
        ]
        spread = group.all_gather("disagreement", spreads)[:size]
        row_weights = token_weight(spread, UNISD_STAR["agreement_gamma"])
    divergences, gradients, weight_gradients, terms = [], [], [], []
    for rank in range(plan.ranks):
        student, teacher, negative = (part[rank] for part in parts)
        leaves = (student.clone().requires_grad_(), weight.clone().requires_grad_())
        head = LMHead(leaves[1])
        divergence = reference.linear_divergence(leaves[0], head, teacher, head.detach(), 0.5 * plan.jsd, TAU)
        mine = torch.arange(rank * plan.rows, min((rank + 1) * plan.rows, size))

        def placed(values: torch.Tensor, mine: torch.Tensor = mine) -> torch.Tensor:
            """In [N] of the whole batch: other ranks' rows are zero."""
            return torch.zeros(size, dtype=torch.float64).index_put((mine,), values[: len(mine)])

        if full:
            own = reference.linear_logprobs(leaves[0], head, targets[rank], TAU).logprobs
            others = [logprobs(hidden, rank, TAU) for hidden in (teacher, negative)]
            hinge = reference.contrastive_hinge(own, *others, UNISD_STAR["contrastive_margin"])
            share = torch.stack(
                [
                    reduce_per_token(placed(divergence), problem.bounds, "sequence", row_weights, "weighted"),
                    UNISD_STAR["contrastive_weight"] * reduce_per_token(placed(hinge), problem.bounds, "sequence"),
                    feature_term(problem, placed(reference.feature_distance(leaves[0], teacher))),
                ]
            )
        else:
            share = placed(divergence).sum().unsqueeze(0)
        gradient, of_weight = torch.autograd.grad(share.sum(), leaves, allow_unused=True)
        divergences.append(divergence.detach())
        gradients.append(gradient)
        weight_gradients.append(of_weight)
        terms.append(share.detach())
    statistics = {}
    if full:
        statistics["loss"] = group.all_reduce("terms of the loss", terms).sum()
    elif not plan.split_rows:
        statistics["divergence"] = group.all_gather("results", divergences)[:size]
    hidden = group.all_gather("dh", gradients)[:size] if not plan.split_rows else torch.cat(gradients)[:size]
    if not plan.case.frozen_head:
        weight_gradients = reduced_weight(plan, group, weight_gradients)
    return Found(statistics, hidden, weight_gradients[0] if not plan.case.frozen_head else None), group


def reduced_weight(plan: Plan, group: Group, parts: Parts) -> Parts:
    if plan.layout == "replicated":
        return [group.all_reduce("dW", parts)]
    size = parts[0].shape[0]
    padded = [torch.cat([part, part.new_zeros(plan.ranks * plan.columns - size, part.shape[1])]) for part in parts]
    return [torch.cat(group.reduce_scatter("dW", padded))[:size]]


def expected(plan: Plan, problem: Problem) -> Found:
    """From the dense reference."""
    student, weight = problem.student.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    head = LMHead(weight)
    if not plan.is_loss:
        scores = reference.linear_logprobs(problem.student, head.detach(), problem.targets)
        return Found({"logprobs": scores.logprobs, "logsumexp": scores.logsumexp})
    if plan.case.operation == "divergence":
        beta = 0.5 * plan.jsd
        divergence = reference.linear_divergence(student, head, problem.teacher, head.detach(), beta, TAU)
        return Found({"divergence": divergence.detach()}, *torch.autograd.grad(divergence.sum(), (student, weight)))
    spec = LossConfig(**UNISD_STAR, return_entropy=True)
    inputs = LossInputs(
        student_hidden=student,
        student_head=head,
        teacher_hidden=problem.teacher,
        teacher_head=head.detach(),
        target_ids=problem.targets,
        cu_seqlens=problem.bounds,
        auxiliary_hidden=tuple(problem.auxiliary),
        auxiliary_head=None,
        negative_hidden=problem.negative,
        negative_head=None,
        token_weights=None,
        num_items=None,
    )
    result = reference.unisd_loss(inputs, spec)
    names = ("divergence", "student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy")
    names += ("auxiliary_logprobs", "negative_logprobs", "loss")
    statistics = {name: getattr(result, name).detach() for name in names}
    return Found(statistics, torch.autograd.grad(result.loss, student)[0])


def simulated(plan: Plan, problem: Problem) -> tuple[Found, Group]:
    if plan.by_rows:
        return by_rows(plan, problem)
    shards = Shards(plan, problem)
    if plan.layout == "logits":
        return shards.gathered_logits(), shards.group
    found = shards.loss() if plan.is_loss else shards.scoring()
    if plan.case.operation == "unisd_loss":
        # The feature term needs no head: on every rank the same.
        student = problem.student.clone().requires_grad_()
        term = feature_term(problem, reference.feature_distance(student, problem.teacher))
        found = found._replace(hidden=found.hidden + torch.autograd.grad(term, student)[0])
    return found, shards.group


def compare(found: Found, wanted: Found) -> None:
    for name, values in found.statistics.items():
        torch.testing.assert_close(
            values, wanted.statistics[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("hidden", "weight"):
        if getattr(wanted, name) is not None and getattr(found, name) is not None:
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-10)


def small_plan(operation: str, layout: str, ranks: int, columns: int, split_rows: bool = False) -> Plan:
    """300 rows in three blocks: neither R, nor the rows of a block, nor the columns of a shard divide them."""
    jsd = OPERATIONS[operation][1]
    like = headline_plan("llama3.1-8b", operation, "vocabulary", 2).case
    case = replace(like, num_rows=300, hidden_size=5, vocab_size=columns)
    return Plan(case, layout, ranks, jsd, split_rows, given=Assumptions(workspace=128 * 1024))


def counted(plan: Plan) -> dict[str, tuple[str, int, float]]:
    return {
        part.what: (part.kind, part.calls, plan.ranks * part.sent_elements(plan.ranks)) for part in plan.collectives()
    }


# Statistics of gathered logits are the reference's own: two operations show what is exchanged.
SIMULATED = [
    (operation, layout, split_rows)
    for operation in OPERATIONS
    for layout in LAYOUTS
    for split_rows in (False, True)
    if layout != "logits" or (operation in ("forward KL", "scoring") and not split_rows)
]


@pytest.mark.parametrize(("ranks", "columns"), [(2, 23), (4, 23), (8, 23), (8, 9)])
@pytest.mark.parametrize(("operation", "layout", "split_rows"), SIMULATED)
def test_shards_give_the_whole_and_exchange_what_is_counted(operation, layout, ranks, columns, split_rows):
    """9 columns on 8 ranks: some have none."""
    plan = small_plan(operation, layout, ranks, columns, split_rows)
    problem = Problem.of(plan.case)
    found, group = simulated(plan, problem)
    compare(found, expected(plan, problem))
    assert found.statistics or plan.split_rows
    assert group.log.keys() == counted(plan).keys()
    for what, (kind, calls, sent) in counted(plan).items():
        assert group.log[what] == (kind, calls, pytest.approx(sent, rel=1e-12)), what


@pytest.mark.parametrize("operation", ["forward KL", "scoring", "UniSD*, K = 3"])
def test_sums_relative_to_the_maximum_hold_for_large_logits(operation):
    """Of several hundred, whose exponentials overflow, in shards of which some underflow whole."""
    plan = small_plan(operation, "vocabulary", 8, 23)
    problem = Problem.of(plan.case, scale=300.0)
    assert logits_of(problem.student, problem.weight, TAU).exp().isinf().any()
    compare(simulated(plan, problem)[0], expected(plan, problem))


def test_the_small_problem_has_several_blocks():
    assert small_plan("forward KL", "vocabulary", 8, 23).blocks == 3
    assert small_plan("forward KL", "vocabulary", 8, 23).calls == 2 * 3 + 1
    assert small_plan("JSD", "vocabulary", 8, 23).blocks == 6
    assert small_plan("JSD", "vocabulary", 8, 23).calls == 3 * 6 + 1
    assert small_plan("UniSD*, K = 3", "vocabulary", 8, 23).calls == 2 + 2 * 3 + 1


def test_bytes_by_hand():
    """Llama's head on 8 ranks; 16-bit operands, float32 statistics, partial sums and logits."""
    N, H, V = 8192, 4096, 128256

    def sent(operation, layout, **changes):
        return replace(headline_plan("llama3.1-8b", operation, layout, 8), **changes).wire_bytes

    assert sent("scoring", "vocabulary") == 2 * 7 / 8 * 4 * 3 * N
    assert sent("forward KL", "vocabulary") == 2 * 7 / 8 * 4 * N * (5 + H)
    assert sent("JSD", "vocabulary") == 2 * 7 / 8 * 4 * N * (6 + H)
    assert sent("forward KL, trainable head", "vocabulary") == sent("forward KL", "vocabulary")
    assert sent("UniSD*, K = 3", "vocabulary") == 2 * 7 / 8 * 4 * N * (4 * 3 + 9 + H)
    assert sent("forward KL", "vocabulary", reduced_bytes=2) == 2 * 7 / 8 * N * (4 * 5 + 2 * H)
    assert sent("forward KL", "logits") == 7 / 8 * (2 * 4 * N * V + 2 * 4 * N * H)
    assert sent("forward KL", "head") == 7 / 8 * (2 * V * H + 2 * N * H + 4 * N)
    assert sent("forward KL, trainable head", "head") == 7 / 8 * (6 * V * H + 2 * N * H + 4 * N)
    assert sent("forward KL, trainable head", "replicated") == 7 / 8 * (8 * V * H + 2 * N * H + 4 * N)
    assert sent("UniSD*, K = 3", "replicated") == 7 / 8 * (2 * N * H + 4 * N + 2 * 3 * 4)
    assert sent("forward KL", "replicated", split_rows=True) == 0
    assert sent("forward KL", "vocabulary", split_rows=True) == 7 / 8 * (2 * 2 * N * H + 4 * N * H + 2 * 4 * N * 5)
    assert sent("UniSD*, K = 3", "vocabulary", split_rows=True) == 7 / 8 * (
        6 * 2 * N * H + 4 * N * H + 2 * 4 * N * (4 * 3 + 9)
    )


def test_padded_shards():
    """Gemma's 262208 columns are 64 x 4097; one more makes 4098 of every shard."""
    plan = headline_plan("gemma3-4b", "forward KL", "head", 64)
    one_more = replace(plan, case=replace(plan.case, vocab_size=plan.case.vocab_size + 1))
    assert (plan.columns, one_more.columns) == (4097, 4098)
    assert one_more.wire_bytes - plan.wire_bytes == 63 / 64 * 2 * 64 * plan.case.hidden_size
    products = replace(one_more, layout="vocabulary").flops / (2 * plan.case.num_rows * plan.case.hidden_size)
    assert products == 3 * 4098


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_collective_takes_its_latency_and_its_bytes(layout):
    plan = headline_plan("llama3.1-8b", "UniSD*, K = 3", layout, 8)
    assert plan.wire_seconds == pytest.approx(plan.calls * 10e-6 + plan.wire_bytes / 450e9)
    across = replace(plan, ranks=16)
    assert across.wire_seconds == pytest.approx(across.calls * 25e-6 + across.wire_bytes / 400e9)
    one = replace(across, links=ONE_RING)
    assert one.wire_seconds == pytest.approx(across.calls * 25e-6 + across.wire_bytes / 50e9)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_rank_is_the_model_of_one_gpu(operation):
    name, jsd = OPERATIONS[operation]
    plans = [headline_plan("gemma3-4b", operation, layout, 1) for layout in ("vocabulary", "head", "replicated")]
    rounding = 6 * 8192 * 2560 / Assumptions().bandwidth if name != "scoring" else 0.0
    model = Model(plans[0].case)
    for plan in plans:
        assert plan.wire_seconds == 0
        assert plan.efficiency == pytest.approx(1.0)
        assert plan.seconds == pytest.approx(model.seconds("chunked" if jsd else "fused", jsd) + rounding)


def test_few_rows_of_auxiliary_views_are_scored_as_one():
    plan = headline_plan("llama3.1-8b", "UniSD*, K = 3", "replicated", 64)
    assert plan.rows * 3 < 2048
    share = plan.share
    rounding = 6 * plan.rows * 4096 / Assumptions().bandwidth
    stacked = Model(replace(share.case, num_rows=3 * plan.rows)).scoring
    assert plan.compute_seconds == pytest.approx(share.divergence("fused") + share.scoring + stacked + rounding)
    assert stacked < 2 * share.scoring


def test_memory_of_a_rank():
    """W, the workspace, and float32 gradients."""
    N, H, V = 8192, 4096, 128256
    plan = headline_plan("llama3.1-8b", "forward KL", "vocabulary", 8)
    assert plan.head_bytes == 2 * H * V // 8
    assert plan.extra_bytes == plan.share.rows("fused").held_bytes + 4 * N * H
    assert replace(plan, layout="replicated").head_bytes == 2 * H * V
    assert replace(plan, layout="head").head_bytes == 2 * H * (V + V // 8)
    assert replace(plan, layout="logits").extra_bytes == 2 * 4 * N * V + 2 * N * V // 8 + 4 * N * H
    trainable = headline_plan("llama3.1-8b", "forward KL, trainable head", "vocabulary", 8)
    assert trainable.extra_bytes == trainable.share.rows("fused").held_bytes + 4 * (N * H + V * H // 8)
    gathered = replace(trainable, layout="head")
    assert gathered.extra_bytes == gathered.share.rows("fused").held_bytes + 4 * (N // 8 * H + V * H) + 2 * N * H
    assert replace(trainable, layout="replicated").extra_bytes == 6 * (N // 8 * H + V * H) + 2 * N * H


def page() -> str:
    return PAGE.read_text()


def prose() -> str:
    return " ".join(page().split())


def every_plan(layout: str = "vocabulary", ranks: tuple[int, ...] = RANKS, links: Links = Links()) -> list[Plan]:
    return [
        headline_plan(head, operation, layout, count, links)
        for head in HEADS
        for operation in OPERATIONS
        for count in ranks
    ]


def test_the_tables_in_the_documentation_are_the_generated_ones():
    begin, end = "<!-- generated: begin -->\n", "<!-- generated: end -->"
    assert page().split(begin)[1].split(end)[0].strip() == report().strip()


def test_the_assumptions_in_the_documentation_are_those_of_the_code():
    links = Links()
    for cell in (
        f"| link within {links.node} GPUs | {links.inside / 1e9:.0f} GB/s |",
        f"| link between nodes | {links.across / 1e9:.0f} GB/s a GPU |",
        f"| rings between nodes | {links.rings}, or 1 |",
        f"{1e6 * links.inside_latency:.0f} us within a node, {1e6 * links.across_latency:.0f} us between nodes",
    ):
        assert cell in page()
    assert links.rings * links.across == 400e9 < links.inside


def test_the_package_has_no_vocabulary_parallel_mode():
    """What the page says of it."""
    sources = [file.read_text() for file in (ROOT / "unisd_kernels").rglob("*.py")]
    assert not any("torch.distributed" in text or "all_reduce" in text for text in sources)
    assert "weight.full_tensor()" in (ROOT / "unisd_kernels" / "causal_model.py").read_text()
    assert "**The package has no vocabulary-parallel mode today**" in prose()


def losses(plans: list[Plan]) -> list[Plan]:
    return [plan for plan in plans if plan.is_loss]


def statistics_share(plan: Plan) -> tuple[float, float]:
    """Of the bytes, and of the time."""
    parts = plan.statistics()
    sent = sum(part.sent_bytes(plan.ranks) for part in parts)
    calls = sum(part.calls for part in parts)
    seconds = calls * plan.links.latency(plan.ranks) + sent / plan.links.bandwidth(plan.ranks)
    return sent / plan.wire_bytes, seconds / plan.seconds


def test_the_wire_does_not_shrink():
    for layout in LAYOUTS:
        for plan in every_plan(layout, (2,)):
            whole = [replace(plan, ranks=ranks).wire_bytes * ranks / (ranks - 1) for ranks in RANKS]
            assert max(whole) == pytest.approx(min(whole), rel=1e-3)
    few, many = (headline_plan("llama3.1-8b", "forward KL", "vocabulary", ranks) for ranks in (2, 64))
    sent = [sum(part.sent_bytes(plan.ranks) for part in plan.hidden()) / 1e6 for plan in (few, many)]
    assert f"sends {sent[0]:.0f} MB a rank at R = 2 and {sent[1]:.0f} MB at R = 64" in prose()
    assert f"falls from {1e3 * few.compute_seconds:.1f} to {1e3 * many.compute_seconds:.2f} ms" in prose()


def test_statistics_are_a_small_part():
    plans = losses(every_plan())
    assert f"at most {max(statistics_share(plan)[0] for plan in plans):.1%} of the bytes" in prose()
    inside, across = (
        max(statistics_share(plan)[1] for plan in plans if (plan.ranks > 8) == beyond) for beyond in (False, True)
    )
    assert f"at most {inside:.1%} of its time within a node and {across:.1%} between nodes" in prose()
    further = []
    for plan in plans:
        if plan.jsd:
            part = next(part for part in plan.statistics() if part.what == "pair: second_sums")
            sent = part.sent_bytes(plan.ranks) / plan.links.bandwidth(plan.ranks)
            further.append((part.calls * plan.links.latency(plan.ranks) + sent) / plan.seconds)
    assert f"further round is at most {max(further):.1%} of its time" in prose()


def test_efficiency_of_the_vocabulary_layout():
    def least(ranks: tuple[int, ...]) -> float:
        return min(plan.efficiency for plan in losses(every_plan(ranks=ranks)))

    inside = min(plan.efficiency for plan in every_plan(ranks=(2, 4, 8)))
    assert f"an efficiency of {inside:.2f} or more" in prose()
    assert f"keep {least((16,)):.2f} at R = 16 and {least((64,)):.2f} at R = 64" in prose()
    even = headline_plan("llama3.1-8b", "forward KL", "vocabulary", 64)
    assert 1.0 < even.wire_seconds / even.compute_seconds < 1.05
    for plan in every_plan(ranks=(2,)):
        assert wire_dominates_from(plan) == (64 if replace(plan, ranks=64) == even else None)
    one = headline_plan("llama3.1-8b", "forward KL", "vocabulary", 16, ONE_RING)
    assert f"forward KL runs at {one.efficiency:.2f} at R = 16" in prose()


def test_from_which_ranks_on_the_wire_dominates_with_one_ring():
    found = {
        (head, operation): wire_dominates_from(headline_plan(head, operation, "vocabulary", 2, ONE_RING))
        for head in HEADS
        for operation in OPERATIONS
    }
    for operation in OPERATIONS:
        llama, gemma = (found[head, operation] for head in HEADS)
        if operation == "scoring":
            assert llama is gemma is None
        else:
            assert (llama, gemma) == ((32, 64) if operation.startswith("UniSD") else (16, 32))


@pytest.mark.parametrize("links", [Links(), ONE_RING])
@pytest.mark.parametrize("split_rows", [False, True])
def test_the_fastest_layout(links, split_rows):
    for plan in every_plan(links=links):
        plan = replace(plan, split_rows=split_rows)
        assert fastest(plan, SHARDED) == "vocabulary"
        gemma_jsd = plan.jsd and plan.case.vocab_size == 262208
        if not plan.case.frozen_head or (gemma_jsd and (links.rings == 8 or plan.ranks <= 8)):
            assert fastest(plan) == "vocabulary"
        elif not plan.jsd and plan.ranks <= 32:
            assert fastest(plan) == "replicated"


def slower(layout: str, ranks: int, select: Callable[[Plan], bool] = lambda plan: True) -> list[float]:
    """Times of a layout as multiples of the vocabulary layout's."""
    plans = [plan for plan in every_plan(ranks=(ranks,)) if select(plan)]
    return [replace(plan, layout=layout).seconds / plan.seconds for plan in plans]


def test_gathered_logits_are_never_an_option():
    two, eight = slower("logits", 2), slower("logits", 8)
    assert f"{min(two):.1f} to {max(two):.1f} times as long at R = 2" in prose()
    assert f"and {min(eight):.1f} to {max(eight):.1f} times at R = 8" in prose()
    assert {wire_dominates_from(plan) for plan in every_plan("logits", (2,))} == {4, 8}
    held = [headline_plan(head, "forward KL", "logits", 8).memory / 1e9 for head in HEADS]
    assert f"at R = 8 it holds {held[0]:.1f} GB (Llama) or {held[1]:.1f} GB (Gemma)" in prose()
    for plan in every_plan("logits", (4,)):
        assert replace(plan, ranks=64).seconds > 0.75 * plan.seconds


def test_from_how_many_rows_gathering_the_head_sends_less():
    """From the counts by hand, without statistics: 2 V H against 6 N H, and so on."""
    for head in HEADS:
        plans = {operation: headline_plan(head, operation, "vocabulary", 8) for operation in OPERATIONS}
        columns = plans["JSD"].case.vocab_size
        kl, trainable, star = (plans[name] for name in ("forward KL", "forward KL, trainable head", "UniSD*, K = 3"))
        for plan, share in (
            (kl, 3),
            (star, 3),
            (trainable, 1),
            (replace(kl, split_rows=True), 4),
            (replace(star, split_rows=True), 8),
            (replace(kl, reduced_bytes=2), 1),
        ):
            assert rows_for_the_head(plan) == pytest.approx(columns / share, rel=0.025)
    numbers = [rows_for_the_head(headline_plan(head, "forward KL", "vocabulary", 8)) for head in HEADS]
    assert f"({numbers[0]:.0f} rows for Llama, {numbers[1]:.0f} for Gemma)" in prose()
    # And on either side of it.
    plan = headline_plan("llama3.1-8b", "forward KL", "vocabulary", 8)
    for rows, fewer in ((42600, False), (42800, True)):
        at = replace(plan, case=replace(plan.case, num_rows=rows))
        assert (replace(at, layout="head").wire_bytes < at.wire_bytes) == fewer


def test_replicated_and_sharded_heads():
    text = prose()

    def frozen_loss(plan: Plan) -> bool:
        return plan.is_loss and plan.case.frozen_head and not (plan.jsd and "gemma" in plan.case.name)

    frozen = slower("replicated", 8, frozen_loss)
    assert f"takes {min(frozen):.2f} to {max(frozen):.2f} of the vocabulary layout's time at R = 8" in text
    held = [
        headline_plan(head, "forward KL", layout, 8).head_bytes / 1e6
        for layout in ("replicated", "vocabulary")
        for head in HEADS
    ]
    assert "({:.0f} and {:.0f} MB in place of {:.0f} and {:.0f} MB)".format(*held) in text
    llama = headline_plan("llama3.1-8b", "JSD", "vocabulary", 2)
    assert f"Llama's at R = 2 by {replace(llama, layout='replicated').seconds / llama.seconds - 1:.0%}" in text
    gemma = headline_plan("gemma3-4b", "JSD", "vocabulary", 8)
    assert f"is {replace(gemma, layout='replicated').seconds / gemma.seconds:.2f} times as fast at R = 8" in text
    assert gemma.efficiency > 1
    assert Model(gemma.case).rows("chunked").block == 128
    for layout, phrase in (
        ("replicated", "{:.1f} times as fast as replicated"),
        ("head", "{:.1f} times as fast as gath"),
    ):
        for ratio in slower(layout, 8, lambda plan: not plan.case.frozen_head):
            assert phrase.format(ratio) in text
    memory = [
        headline_plan("llama3.1-8b", "forward KL, trainable head", layout, 8).memory / 1e9
        for layout in ("vocabulary", "replicated", "head")
    ]
    assert "holds {:.1f} GB where these hold {:.1f} and {:.1f} GB (Llama)".format(*memory) in text


def test_few_rows_a_rank():
    given = Assumptions()
    rows = given.product_flops / given.bandwidth
    assert f"needs {round(rows, -1):.0f} rows to be bound by its FLOPs" in prose()
    assert headline_plan("gemma3-4b", "scoring", "replicated", 64).rows == 128 < rows
    for ratio in slower("replicated", 64, lambda plan: not plan.is_loss):
        assert f"takes {ratio:.1f} times as long as the vocabulary layout there" in prose()
