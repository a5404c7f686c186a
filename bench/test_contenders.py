"""`pytest bench/ --benchmark-only`: every contender with pytest-benchmark, one group for each case and divergence.

    pytest bench/ --benchmark-only -rs --bench-case kl scoring --bench-device cpu --bench-peers unisd_kernels orda

The options are in `conftest.py`; the bare matrix products always take part; `-rs` says why a contender was skipped. All
of pytest-benchmark's own options work, such as `--benchmark-json`, `--benchmark-compare` and, for the number of rounds,
`--benchmark-min-rounds`.

The times here are not interleaved: one contender's rounds all come before the next one's, so that a drift of the
machine looks like a difference between them, and no ratios are formed. The ratios that the documentation prints are
those of `unisd bench` (`python -m bench`), which takes turns. Here a sample is one step, on CUDA with its launches and
the wait for its end, which counts for short steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench.conftest import Group
from bench.measure import failure_text, rotating
from bench.peers import FLOOR, OURS, PEERS, NotHere, NotOffered, Peer, Step
from bench.results_file import case_fields

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark", reason='pytest-benchmark is not installed: pip install ".[bench,peers]"')

SKIPPED = (NotOffered, NotHere, ImportError, torch.OutOfMemoryError)


def test_contender(benchmark: BenchmarkFixture, group: Group, peer: str, pytestconfig: pytest.Config) -> None:
    contender = PEERS[peer]
    benchmark.group = group.name
    benchmark.extra_info.update(
        case_fields(group.case), divergence=group.divergence, peer=peer, note=contender.note, device=str(group.device)
    )
    reason = None
    try:
        step = contender.build(group.case, group.beta, group.device)
        check(contender, step, group, benchmark.extra_info)
        benchmark.pedantic(
            synchronized(rotating(step, group.sets, 1), group),
            rounds=pytestconfig.getoption("benchmark_min_rounds"),
            warmup_rounds=1,
        )
    except SKIPPED as error:
        if peer in (FLOOR, OURS):
            raise
        reason = failure_text(error)
    # Outside of the handler: the exception would keep what its frames hold.
    if reason:
        pytest.skip(f"{peer}: {reason}")


def check(contender: Peer, step: Step, group: Group, extra_info: dict[str, Any]) -> None:
    """Notes how far the first outcome is from float64; of this package's it must be within its limit."""
    outcome = step(group.sets[0])
    errors = group.expected.errors(outcome, contender.mean_only)
    limits = group.expected.limits_of(errors)
    extra_info.update(errors, **limits)
    if contender.name == OURS or contender.variant:
        for name, error in errors.items():
            limit = limits[f"{name}_limit"]
            assert error <= limit, f"{contender.name}: {name.replace('_', ' ')} {error:.1e}, at most {limit:.1e}"


def synchronized(step: Callable[[], object], group: Group) -> Callable[[], None]:
    """The step to the end of its work."""
    on_cuda = group.device.type == "cuda"

    def run() -> None:
        step()
        if on_cuda:
            torch.cuda.synchronize(group.device)

    return run
