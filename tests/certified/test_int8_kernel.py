"""The C++ kernel: its sums are those of the codes it gets, and its intervals hold the exact log-probability."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.certified.problems import views_problem
from tests.certified.test_scores import THRESHOLDS, check_bounds
from unisd_kernels import LMHead, reference
from unisd_kernels.backends import extension
from unisd_kernels.certified.int8_head import Int8Head, padded
from unisd_kernels.certified.scores import logprob_bounds

pytestmark = pytest.mark.skipif(extension.cpu_unavailable() is not None, reason="the compiled library is absent")


def coded(rows: int, width: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, the extremes among them, with zeros behind, and scales."""
    codes = torch.zeros(rows, padded(width), dtype=torch.int8)
    codes[:, :width] = torch.randint(-127, 128, (rows, width), generator=generator)
    codes[0, :width] = -127
    return codes, (0.5 + torch.rand(rows, generator=generator)) / (60 * width**0.5)


def check_sums(rows: int, columns: int, width: int, variant: int, threshold: float = 1e-3) -> None:
    """All six results, against float64 of the same codes."""
    generator = torch.Generator().manual_seed(rows + 7 * columns + 31 * width + variant)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    directions = min(16, width // 4)
    codes, scales = coded(rows, width, generator)
    head_codes, head_scales = coded(columns, width, generator)
    if variant % 3 == 0 and rows > 1:
        codes[1] = 0
        scales[1] = 0
    along, lead = normal(rows, directions), normal(columns, directions) / 4
    dtype = (torch.float32, torch.bfloat16, torch.float16)[variant % 3]
    hidden, weight = normal(rows, width).to(dtype), (normal(columns, width) / width**0.5).to(dtype)
    bias = normal(columns) if variant % 2 else None
    scale, tanh_scale = (1.0, -0.8, 1.0, 1.5)[variant % 4], 5.0 if variant % 4 == 3 else None
    floor = torch.full((rows,), -30.0 if variant % 2 else -1e4)
    sums = torch.full((6, rows), math.nan)
    extension.operations().int8_score(
        codes,
        scales,
        along,
        floor,
        hidden,
        head_codes,
        head_scales,
        128 * head_codes.sum(1, dtype=torch.int32),
        lead,
        weight,
        bias,
        scale,
        tanh_scale,
        math.log(threshold),
        sums,
    )

    def finished(products: torch.Tensor) -> torch.Tensor:
        logits = scale * (products if bias is None else products + bias.double())
        return logits if tanh_scale is None else tanh_scale * torch.tanh(logits)

    wide = codes.double() * scales.double().unsqueeze(-1), head_codes.double() * head_scales.double().unsqueeze(-1)
    logits = finished(wide[0] @ wide[1].T + along.double() @ lead.double().T)
    exact = finished(hidden.double() @ weight.double().T)
    highest = logits.amax(-1)
    share = (logits - highest.unsqueeze(-1)).exp()
    total = share.sum(-1)
    expected_floor = torch.maximum(floor.double(), highest + total.log() + math.log(threshold))
    torch.testing.assert_close(sums[0].double(), highest, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[1].double(), total, rtol=1e-4, atol=0)
    torch.testing.assert_close(sums[5].double(), expected_floor, rtol=1e-5, atol=1e-4)
    # By the kernel's own floor, from which a logit may be a rounding away.
    above = logits > sums[5].double().unsqueeze(-1)
    sure = ((logits - sums[5].double().unsqueeze(-1)).abs() > 1e-4).all(-1)
    assert bool(sure.any())
    rest = share.masked_fill(above, 0.0)
    of_exact = (exact - highest.unsqueeze(-1)).exp().masked_fill(~above, 0.0)
    for place, values in ((2, rest.sum(-1)), (3, rest.square().sum(-1)), (4, of_exact.sum(-1))):
        found = sums[place].double()
        tolerance = 1e-4 * (values + 1e-6 * total)
        assert bool(((found - values).abs() <= tolerance)[sure].all()), (place, found, values)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 130, 4101])
def test_sums(columns):
    for variant, (rows, width) in enumerate(((1, 1), (17, 2), (49, 5), (3, 33), (16, 64), (100, 130), (65, 577))):
        check_sums(rows, columns, width, variant + columns)


def sums_of_given_logits(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """The sums of two rows with these approximate logits, whose exact logits are 0."""
    columns, sums = len(logits), torch.empty(6, 2)
    extension.operations().int8_score(
        torch.zeros(2, 4, dtype=torch.int8),
        torch.ones(2),
        torch.ones(2, 1),
        torch.full((2,), -1e4),
        torch.zeros(2, 4),
        torch.zeros(columns, 4, dtype=torch.int8),
        torch.ones(columns),
        torch.zeros(columns, dtype=torch.int32),
        logits.unsqueeze(-1),
        torch.zeros(columns, 4),
        None,
        1.0,
        None,
        math.log(threshold),
        sums,
    )
    assert torch.equal(sums[:, 0], sums[:, 1])
    return sums[:, 0].double()


def test_a_full_list_is_cleared_of_what_fell_under_the_floor():
    # Each column is the largest so far, so all of them come on the list.
    logits = torch.arange(9000) * 0.005
    highest, total, rest, squares, sure, floor = sums_of_given_logits(logits, 1e-4)
    share = (logits.double() - highest).exp()
    assert total == pytest.approx(float(share.sum()), rel=1e-5)
    assert float(floor) == pytest.approx(float(highest + total.log() + math.log(1e-4)), abs=1e-4)
    left = share[logits <= floor]
    assert rest == pytest.approx(float(left.sum()), rel=1e-5)
    assert squares == pytest.approx(float(left.square().sum()), rel=1e-5)
    assert sure == pytest.approx(float((logits > floor).sum() * (-highest).exp()), rel=1e-5)


def test_a_list_that_stays_full_is_closed():
    # At this threshold equal logits all are above the floor.
    _, total, rest, squares, sure, floor = sums_of_given_logits(torch.zeros(9000), 1e-5)
    assert floor.isinf()
    assert total == 9000
    assert 0 < rest < 9000
    assert squares == rest
    assert sure == 9000 - rest


def test_no_rows():
    problem = views_problem(3, num_views=1, width=8, columns=30).to(torch.float32)
    ready = Int8Head.of(problem.head, problem.others)
    bounds = logprob_bounds(problem.views[0][:0], ready, problem.target_ids[:0], impl="native")
    assert bounds.lower.shape == bounds.upper.shape == (0,)


def test_bounds_hold():
    assert sum(check_bounds(seed, torch.float32, "native") for seed in range(60)) > 30


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(10))
def test_bounds_hold_on_ten_thousand_problems(part):
    seeds = range(1000 * part, 1000 * (part + 1))
    assert sum(check_bounds(seed, torch.float32, "native") for seed in seeds) > 500


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_those_of_pytorch(seed):
    problem = views_problem(seed, num_views=1).to(torch.float32)
    ready = Int8Head.of(problem.head, problem.others)
    for threshold in THRESHOLDS:
        torch_lower, torch_upper = logprob_bounds(problem.views[0], ready, problem.target_ids, threshold)
        lower, upper = logprob_bounds(problem.views[0], ready, problem.target_ids, threshold, "native")
        # PyTorch's form makes a column exact for a block of rows, so both differ by what the intervals allow.
        close = 1e-5 * (1 + torch_lower.abs())
        assert bool(((lower <= torch_upper + close) & (torch_lower <= upper + close)).all())
        if threshold == 1.0:  # nothing is exact; the kernel knows better what the largest of the rest is
            assert bool((lower >= torch_lower - 1e-4).all())
            torch.testing.assert_close(upper, torch_upper, rtol=1e-4, atol=1e-4)


def adversarial() -> dict[str, tuple[torch.Tensor, LMHead]]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 12, generator=generator), torch.randn(150, 12, generator=generator)
    huge, channel = weight.clone(), hidden.clone()
    huge[70] *= 1e4
    channel[:, 3] *= 1e3
    cases = {
        "a huge column": (hidden, huge),
        "a huge channel": (channel, weight / 100),
        "constant rows": (torch.ones(5, 12), weight),
        "a weight of constants": (hidden, torch.ones(150, 12)),
        "zeros": (torch.zeros(5, 12), weight),
        "a weight of zeros": (hidden, torch.zeros(150, 12)),
        "tiny": (hidden * 1e-18, weight * 1e-18),
        "equal columns": (hidden, weight[:1].expand(150, 12).contiguous()),
    }
    return {name: (rows, LMHead(values)) for name, (rows, values) in cases.items()}


@pytest.mark.parametrize("name", adversarial())
def test_bounds_of_adversarial_rows(name):
    hidden, head = adversarial()[name]
    ids = torch.tensor([0, 149, 70, 3, 64])
    wide = LMHead(head.weight.double())
    exact = reference.linear_logprobs(hidden.double(), wide, ids).logprobs
    ready = Int8Head.of(head, hidden)
    for threshold in THRESHOLDS:
        lower, upper = logprob_bounds(hidden, ready, ids, threshold, "native")
        slack = 3e-6 * (1.0 + exact.abs() + (hidden.double() @ wide.weight.T).abs().amax(-1))
        assert bool((lower <= exact + slack).all()), lower - exact
        assert bool((upper >= exact - slack).all()), exact - upper


def test_no_number_is_no_bound():
    problem = views_problem(5, num_views=1, num_rows=4, width=8, columns=30).to(torch.float32)
    hidden, weight = problem.views[0].clone(), problem.head.weight
    ready = Int8Head.of(problem.head, problem.others)
    hidden[1, 2], hidden[2, 0] = math.nan, math.inf
    for values in logprob_bounds(hidden, ready, problem.target_ids, impl="native"):
        assert values.isnan().tolist() == [False, True, True, False]
    bias = torch.zeros(len(weight))
    bias[4] = -math.inf
    head = LMHead(weight, bias)
    for values in logprob_bounds(
        problem.views[0], Int8Head.of(head, problem.others), problem.target_ids, impl="native"
    ):
        assert bool(values.isnan().all())
    with pytest.raises(ValueError, match="not finite"):
        Int8Head.of(LMHead(weight.clone().index_fill_(0, torch.tensor([3]), math.nan)), problem.others)


def test_any_number_of_threads_gives_the_same_bits():
    problem = views_problem(1, num_views=1, num_rows=300, width=24, columns=2500, size=3.0).to(torch.float32)
    ready = Int8Head.of(LMHead(problem.head.weight), problem.views[0])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(torch.stack(logprob_bounds(problem.views[0], ready, problem.target_ids, 1e-3, "native")))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.exhaustive  # the C++ check (tests/build/kernels) has all of them always
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_sums_with_other_instruction_sets(isa):
    """In a process of its own: the set is chosen once."""
    root = Path(__file__).parents[2]
    code = (
        "from tests.certified.test_int8_kernel import check_sums\n"
        "for variant, (rows, columns, width) in enumerate(((1, 65, 5), (49, 130, 33), (20, 70, 577))):\n"
        "    check_sums(rows, columns, width, variant)\n"
    )
    environment = os.environ | {"UNISD_CPU_ISA": isa, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    if "not an instruction set of this processor" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stderr
