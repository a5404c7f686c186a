"""Benchmarks of tiny cases need no long samples."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measuring.measure.SHORTEST_ON_CPU", 0.05)
