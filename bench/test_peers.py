"""`pytest bench/ --benchmark-only`: every peer with pytest-benchmark, one group for each case and divergence.

    pytest bench/ --benchmark-only -rs --bench-case kl scoring --bench-device cpu --bench-peers unisd_kernels orda

The options are in `conftest.py`; the bare matrix products always take part; `-rs` says why a peer was skipped. All
of pytest-benchmark's own options work, such as `--benchmark-json`, `--benchmark-compare` and, for the number of rounds,
`--benchmark-min-rounds`.

The times here are not interleaved: one peer's rounds all come before the next one's, so that a drift of the
machine looks like a difference between them, and no ratios are formed. The ratios that the documentation prints are
those of `python -m bench`, which takes turns. Here a sample is one step, on CUDA with its launches and the wait for its
end, which counts for short steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from bench.inputs.sets import rotating
from bench.measuring.setting import Setting, row_of
from bench.peers import FLOOR, OURS, PEERS
from bench.records.failures import NotHere, NotOffered, failure_text
from bench.records.verdict import errors_text, is_wrong

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark", reason='pytest-benchmark is not installed: pip install ".[bench,peers]"')

SKIPPED = (NotOffered, NotHere, ImportError, torch.OutOfMemoryError)


def test_peer(benchmark: BenchmarkFixture, setting: Setting, name: str, pytestconfig: pytest.Config) -> None:
    peer, case = PEERS[name], setting.case
    row = row_of(case, setting.beta, peer, setting.device)
    benchmark.group = case.name if case.operation == "scoring" else f"{case.name}, {row['divergence']}"
    benchmark.extra_info.update(row, device=str(setting.device))
    reason = None
    try:
        step = peer.build(case, setting.beta, setting.device)
        errors = setting.errors(peer, step(setting.sets[0]))
        benchmark.extra_info.update(errors)
        # Another's error is its own.
        assert not is_wrong(errors) or not (name == OURS or peer.variant), f"{name}: {errors_text(errors)}"
        benchmark.pedantic(
            synchronized(rotating(step, setting.sets, 1), setting.device),
            rounds=pytestconfig.getoption("benchmark_min_rounds"),
            warmup_rounds=1,
        )
    except SKIPPED as error:
        if name in (FLOOR, OURS):
            raise
        reason = failure_text(error)
    # Outside of the handler: the exception would keep what its frames hold.
    if reason:
        pytest.skip(f"{name}: {reason}")


def synchronized(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The step to the end of its work."""

    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
