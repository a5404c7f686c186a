"""Benchmarks of tiny cases need no long samples, and no process for the memory of each peer."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measuring.measure.SHORTEST_ON_CPU", 0.05)
    # Nor processes of their own for their memory.
    monkeypatch.setattr("bench.measuring.measure.MEMORY_APART", False)
