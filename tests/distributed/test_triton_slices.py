"""Vocabulary-parallel heads with Triton's kernels, under its interpreter where there is no GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from tests.distributed.ranks import run
from tests.distributed.slices import EVERYTHING, joined, limits, loss_of, sliced
from tests.support import assert_accurate, make_problem
from unisd_kernels import available, linear_logprobs
from unisd_kernels.ops import logprobs

pytestmark = pytest.mark.skipif(not available("cpu")["triton"], reason="the interpreter is not on")


def assert_like_one_process(impl: str, dtype: torch.dtype, ranks: int, bounds=None, **settings) -> None:
    beta = settings.pop("beta")
    problem = make_problem(
        vocab_size=70, lengths=(3,), hidden_size=8, num_auxiliary=1, bias=True, dtype=dtype, **settings
    )
    options = {**EVERYTHING, "beta": beta, "clip_cap": 1.0}
    exact = loss_of(problem, **options, impl="torch")
    given = problem.to(dtype)
    single = loss_of(given, **options, impl=impl)
    bounds = bounds or limits(70, ranks)
    parts, _ = run(len(bounds) - 1, lambda g: loss_of(sliced(given, g.rank(), g, bounds), **options, impl=impl))
    for name, value in joined(parts).items():
        if value.dtype != torch.bool:
            # Within twice the error of the same kernels in one process, and the floor.
            assert_accurate(f"{impl}, beta={beta}, {name}", value, exact[name], single[name])


@pytest.mark.parametrize(
    ("beta", "settings"),
    [
        (0.0, {"shared_head": True, "frozen_head": True}),
        (1.0, {"shared_head": True}),
        (0.5, {"softcap": 8.0, "frozen_head": True}),
    ],
)
def test_slices_are_like_one_process(beta, settings):
    assert_like_one_process("triton", torch.float32, 2, beta=beta, **settings)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 0.97])
@pytest.mark.parametrize("settings", [{"shared_head": True, "frozen_head": True}, {"softcap": 8.0}, {}])
def test_every_slice_is_like_one_process(dtype, beta, settings):
    assert_like_one_process("triton", dtype, 3, beta=beta, **settings)
    assert_like_one_process("triton", dtype, 4, [0, 5, 5, 70, 70], beta=beta, **settings)


def test_the_fused_design_by_name_says_that_it_takes_none():
    def on(group):
        problem = make_problem(vocab_size=8, lengths=(2,), shared_head=True, dtype=torch.float32).to(torch.float32)
        with pytest.raises(ValueError, match="'triton_fused' takes no vocabulary-parallel head"):
            loss_of(sliced(problem, group.rank(), group, limits(8, 1)), impl="triton_fused", contrastive_weight=0.0)

    run(1, on)


def test_the_ids_of_a_slice_are_checked_before_its_kernel():
    """Which sees those of its own columns only."""

    def on(group):
        problem = make_problem(vocab_size=8, lengths=(2,), shared_head=True).to(torch.float32)
        part = sliced(problem, group.rank(), group, limits(8, 1))
        with torch.no_grad():
            linear_logprobs(part.student_hidden, part.student_head, part.target_ids, impl="triton")

    with mock.patch.object(logprobs, "check_target_ids", wraps=logprobs.check_target_ids) as check_ids:
        run(1, on)
    assert check_ids.call_args.kwargs == {"kernel_asserts": False}
