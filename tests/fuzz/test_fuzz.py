"""Random calls against the oracle. A failure prints the seed: `shortfalls(make_case(SEED), IMPL)` is all it takes."""

from __future__ import annotations

import pytest
import torch

from tests.fuzz.cases import make_case
from tests.fuzz.compare import shortfalls
from unisd_kernels import available

CPU = torch.device("cpu")
# The interpreter's bfloat16 products are wrong; and these kernels keep no digits of a mixture with so small a share.
TRITON = {"dtypes": (torch.float32, torch.float16), "extreme_betas": ()}
IMPLS = ("native", "torch", "reference", "triton_fused", "triton_chunked")


def sweep(impl: str, seeds: range) -> None:
    failures = []
    for seed in seeds:
        case = make_case(seed, **TRITON) if impl.startswith("triton") else make_case(seed)
        if impl == "native" and case.dtype == torch.float64:
            continue
        missed = shortfalls(case, impl)
        if missed:
            failures.append(f"seed {seed}, {case.operation}: {'; '.join(missed)}\n  {case.about}")
    assert not failures, f"{len(failures)} of {len(seeds)} cases of {impl}\n" + "\n".join(failures[:10])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_few_random_calls(impl):
    if impl != "reference" and not available(CPU).get(impl) and not impl.startswith("triton"):
        pytest.skip(f"{impl} is not available")
    sweep(impl, range(4) if impl.startswith("triton") else range(120))


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("impl", IMPLS)
def test_many_random_calls(impl, part):
    count = 250 if impl.startswith("triton") else 2500
    sweep(impl, range(10_000 + part * count, 10_000 + (part + 1) * count))
