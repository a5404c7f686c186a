"""Vocabulary-parallel heads: every operation on slices of a vocabulary is that of one process. Ranks are threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run
from tests.distributed.slices import EVERYTHING, V, joined, limits, loss_of, sliced, whole_problem
from tests.support import Problem, assert_accurate, make_problem, natives
from unisd_kernels import LMHead, LossConfig, LossInputs, available, linear_divergence, linear_logprobs, reference

# A constant cap is put in the middle of the divergences, between two of them.
CLIPS: list[dict[str, Any]] = [{}, {"clip_cap": None}, {"clip_quantile": 0.6}]
HEADS: dict[str, dict[str, Any]] = {
    "two heads": {},
    "one head": {"shared_head": True},
    "capped": {"softcap": 8.0, "frozen_head": True},
    "one frozen": {"shared_head": True, "frozen_head": True, "bias": False},
}
IMPLEMENTATIONS = [name for name in ("torch", "native") if available("cpu")[name]]


def on_slices(problem: Problem, bounds: list[int], **options: Any) -> dict[str, torch.Tensor]:
    parts, _ = run(len(bounds) - 1, lambda group: loss_of(sliced(problem, group.rank(), group, bounds), **options))
    return joined(parts)


def clip_of(clip: dict[str, Any], problem: Problem, **options: Any) -> dict[str, Any]:
    """The settings of a clip for this problem."""
    if "clip_cap" not in clip:
        return clip
    ordered = loss_of(problem, **options)["divergence"].sort().values
    return {"clip_cap": float(ordered[len(ordered) // 2 :][:2].mean())}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Within a share of the largest entry, or of 0.1."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.dtype == torch.bool:
            assert torch.equal(found[name], value), name
        elif value.numel():
            error = (found[name] - value).abs().max() / value.abs().max().clamp(min=0.1)
            assert error <= tolerance, f"{name}: {float(error):.3g}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_a_loss_with_everything_is_that_of_one_process(ranks, heads):
    """In float64, to 1e-12: V = 1009 has an uneven last slice on 2, 3 and 4 ranks."""
    problem = whole_problem(**HEADS[heads])
    for beta, clip in zip((0.0, 1.0, 0.5), CLIPS, strict=True):
        options = {**EVERYTHING, "beta": beta}
        options |= clip_of(clip, problem, **options)
        wanted = loss_of(problem, **options)
        assert not clip or 0 < int(wanted["clipped"].sum()) < wanted["clipped"].numel()
        assert_same(on_slices(problem, limits(V, ranks), **options), wanted, 1e-12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 0.02, 0.98])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("agreement", ["token", "sequence"])
def test_every_loss_is_that_of_one_process(beta, heads, agreement):
    problem = whole_problem(**HEADS[heads])
    for clip in CLIPS:
        for normalization in ("sequence", "token"):
            for bounds in ([0, V], [0, 1, V], [0, 300, 300, 301, V], [0, 0, 505, V, V]):
                options = {**EVERYTHING, "beta": beta, "agreement": agreement, "normalization": normalization}
                options |= clip_of(clip, problem, **options)
                assert_same(on_slices(problem, bounds, **options), loss_of(problem, **options), 1e-12)


def exact_and_natives(problem: Problem, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The dense reference in float64, and what native-dtype PyTorch makes of it."""

    def dense(given: Problem) -> dict[str, torch.Tensor]:
        inputs = LossInputs(**given.arguments())
        result = reference.unisd_loss(inputs, LossConfig(**options))
        gradients = torch.autograd.grad(result.loss, given.leaves)
        names = ["gradient of hidden", "gradient of weight", "gradient of bias"][: len(gradients)]
        fields = {name: value.detach() for name, value in result._asdict().items() if value is not None}
        return fields | dict(zip(names, gradients, strict=True))

    return dense(problem), natives(lambda: dense(problem.to(dtype)))


def assert_by_the_error_rule(problem: Problem, dtype: torch.dtype, ranks: int, impl: str, **changes: Any) -> None:
    options = {**EVERYTHING, **changes}
    exact, native = exact_and_natives(problem, dtype, options)
    found = on_slices(problem.to(dtype), limits(V, ranks), impl=impl, **options)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value.dtype != torch.bool:
            assert_accurate(f"{impl}, {dtype}, {name}", found[name], value, [each[name] for each in native])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_bfloat16_keep_the_error_rule(impl, dtype):
    pairs = {"torch": ((1.0, "two heads"), (0.02, "capped")), "native": ((0.0, "one head"), (0.5, "one frozen"))}
    for beta, heads in pairs[impl]:
        assert_by_the_error_rule(whole_problem(dtype, **HEADS[heads]), dtype, 3, impl, beta=beta)


@pytest.mark.exhaustive
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_every_dtype_keeps_the_error_rule(impl, dtype, heads, ranks):
    for beta in (0.0, 1.0, 0.5, 0.02, 0.98):
        for seed in (0, 1):
            problem = whole_problem(dtype, seed=seed, **HEADS[heads])
            assert_by_the_error_rule(problem, dtype, ranks, impl, beta=beta, clip_cap=3.0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_small_divergence_keeps_its_digits(impl):
    """Shares of the ranks and log-sum-exps are of order one, the divergence is 1e-6."""
    problem = whole_problem(torch.float32, shared_head=True, frozen_head=True)
    near = problem.student_hidden.detach() + 1e-3 * (problem.teacher_hidden - problem.student_hidden.detach())
    problem = Problem(**{**problem.arguments(), "teacher_hidden": near.float().double()})
    for beta in (0.0, 1.0, 0.5):
        options = {"beta": beta, "divergence_weight": 1.0, "contrastive_weight": 0.0}
        exact = loss_of(problem, **options)["divergence"]
        assert exact.max() < 1e-5
        single = loss_of(problem.to(torch.float32), impl=impl, **options)["divergence"]
        found = on_slices(problem.to(torch.float32), limits(V, 3), impl=impl, **options)["divergence"]
        error, of_one = ((value - exact).abs().max() / exact.max() for value in (found, single))
        assert error <= 2.0 * of_one + 1e-5, (beta, float(error), float(of_one))


BOUNDS = {
    "uneven": [0, 1, 400, V],
    "empty in the middle": [0, 505, 505, V],
    "empty first and last": [0, 0, V, V],
}


@pytest.mark.parametrize("bounds", BOUNDS)
def test_uneven_and_empty_slices(bounds):
    for beta, heads in ((0.0, "two heads"), (0.5, "one frozen"), (1.0, "one head")):
        problem, options = whole_problem(**HEADS[heads]), {**EVERYTHING, "beta": beta, "clip_quantile": 0.6}
        assert_same(on_slices(problem, BOUNDS[bounds], **options), loss_of(problem, **options), 1e-12)


@pytest.mark.parametrize("padding", [15, 600])
def test_padded_slices(padding):
    """`vocab_size` counts the whole vocabulary: the last slice is padded in part, or whole, and gets no gradient."""
    problem = whole_problem(padded_vocab=padding)
    bounds = limits(V + padding, 4)
    wanted = loss_of(problem, **EVERYTHING)
    assert_same(on_slices(problem, bounds, **EVERYTHING), wanted, 1e-12)
    assert not wanted["gradient of weight"][V:].any()


def logprob_results(hidden, head, targets, upstream, entropy, impl) -> dict[str, torch.Tensor]:
    hidden = hidden.detach().clone().requires_grad_(hidden.requires_grad)
    result = linear_logprobs(hidden, head, targets, temperature=0.8, return_entropy=entropy, impl=impl)
    found = {name: value.detach() for name, value in result._asdict().items() if value is not None}
    total = sum((value * weight).sum() for value, weight in zip(filter(lambda v: v is not None, result), upstream))
    named = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    leaves = {name: leaf for name, leaf in named.items() if leaf is not None and leaf.requires_grad}
    if leaves:
        gradients = torch.autograd.grad(total, list(leaves.values()))
        found |= {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}
    return found


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_log_probabilities(frozen, entropy, softcap):
    """With gradients of each statistic, by the rows that the forward keeps (frozen, no entropy) and by recomputing."""
    problem = whole_problem(frozen_head=frozen, softcap=softcap)
    upstream = torch.randn(3, problem.num_rows, dtype=torch.float64)
    for bounds in (limits(V, 3), [0, V, V]):
        for impl in ("torch", *IMPLEMENTATIONS):
            dtype = torch.float32 if impl == "native" else torch.float64
            given = problem.to(dtype)
            rest = (given.target_ids, upstream.to(dtype), entropy, impl)
            wanted = logprob_results(given.student_hidden, given.student_head, *rest)

            def on(group, given=given, bounds=bounds, rest=rest):
                own = sliced(given, group.rank(), group, bounds)
                return logprob_results(own.student_hidden, own.student_head, *rest)

            parts, _ = run(len(bounds) - 1, on)
            assert_same(joined(parts), wanted, 1e-12 if dtype == torch.float64 else 1e-5)


def test_targets_at_the_bounds_of_slices():
    """The first and the last column of each slice belong to it alone, also beside slices without a column."""
    bounds = [0, 0, 7, 8, 20]
    targets = torch.tensor([0, 6, 7, 8, 19])
    for impl, dtype in (("torch", torch.float64), *((name, torch.float32) for name in IMPLEMENTATIONS)):
        problem = make_problem(lengths=(5,), vocab_size=20, shared_head=True)
        problem = Problem(**problem.arguments() | {"target_ids": targets}).to(dtype)
        options = {**EVERYTHING, "impl": impl}
        wanted = loss_of(problem, **options)
        assert_same(on_slices(problem, bounds, **options), wanted, 1e-12 if dtype == torch.float64 else 1e-5)


def test_slices_that_have_nothing_to_say():
    """Logits of hundreds: of most rows all but one slice's exponentials vanish beside the largest."""
    problem = whole_problem(logit_std=300.0)
    for beta in (0.0, 1.0, 0.5):
        options = {**EVERYTHING, "beta": beta}
        assert_same(on_slices(problem, limits(V, 4), **options), loss_of(problem, **options), 1e-12)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_divergence_with_any_upstream_weights(frozen, beta):
    problem = whole_problem(frozen_head=frozen)
    upstream = torch.randn(problem.num_rows, dtype=torch.float64)

    def results(given: Problem) -> dict[str, torch.Tensor]:
        found = linear_divergence(*list(given.arguments().values())[:4], beta=beta, temperature=0.8)
        gradients = torch.autograd.grad((found * upstream).sum(), given.leaves)
        names = [f"gradient of {name}" for name in ("hidden", "weight", "bias")]
        return {"divergence": found.detach()} | dict(zip(names, gradients))

    parts, _ = run(3, lambda group: results(sliced(problem, group.rank(), group, limits(V, 3))))
    assert_same(joined(parts), results(problem), 1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_that_is_not_finite_is_so_on_every_rank(impl):
    """One infinite weight, in one slice: the rows' statistics are NaN on all ranks, and nobody waits for anybody."""
    dtype = torch.float32 if impl == "native" else torch.float64
    for beta in (0.0, 0.5, 1.0):
        problem = whole_problem(frozen_head=True).to(dtype)
        problem.student_hidden.data[3, 0] = torch.inf
        with pytest.warns(UserWarning, match="unisd_loss is nan"):
            found = on_slices(problem, limits(V, 3), beta=beta, impl=impl)
        for name in ("divergence", "student_logprobs", "student_entropy"):
            assert found[name].isnan().nonzero().flatten().tolist() == [3], name
        assert found["gradient of hidden"][3].isnan().all()
        assert found["gradient of hidden"][[0, 8]].isfinite().all()


def test_without_a_row_nothing_is_exchanged():
    """Ranks of a vocabulary hold the same rows: where all are masked, all send nothing."""
    problem = make_problem(lengths=(0, 0), vocab_size=23)

    def on(group):
        own = sliced(problem, group.rank(), group, limits(23, 3))
        sent = len(group.messages)
        with pytest.warns(UserWarning, match="got no rows"):
            found = loss_of(own, **EVERYTHING, clip_quantile=0.5)
        assert len(group.messages) == sent
        scores = linear_logprobs(own.student_hidden, own.student_head, own.target_ids)
        divergence = linear_divergence(own.student_hidden, own.student_head, own.teacher_hidden, own.teacher_head)
        (scores.logprobs.sum() + divergence.sum()).backward()
        assert len(group.messages) == sent
        return found

    parts, _ = run(3, on)
    assert float(joined(parts)["loss"]) == 0.0


def test_small_workspaces_cut_rows_alike_on_uneven_slices():
    """Ranks with few columns could take more rows at a time; then they would call fewer collectives."""
    problem, bounds = whole_problem(), [0, 1, 400, V]
    options = {**EVERYTHING, "workspace_bytes": 8 * 2 * 609 * 4}
    assert_same(on_slices(problem, bounds, **options), loss_of(problem, **options), 1e-12)


def test_autocast_keeps_the_slices():
    problem = whole_problem().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = loss_of(problem)

    def on(group):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(sliced(problem, group.rank(), group, limits(V, 2)))

    parts, _ = run(2, on)
    assert_same(joined(parts), wanted, 2e-2)


def test_slices_of_heads_that_are_replaced_ask_nobody():
    """`dataclasses.replace`, `detach`: what the ranks agreed on is kept."""

    def on(group):
        head = LMHead(torch.randn(2, 4), vocab_start=2 * group.rank(), group=group)
        sent = len(group.messages)
        others = [replace(head, weight=head.weight.double()), head.detach()]
        assert len(group.messages) == sent == 1
        assert head.is_same(others[1])
        return [each.num_columns for each in (head, *others)]

    assert run(3, on)[0] == [[6, 6, 6]] * 3
