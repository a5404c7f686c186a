"""README.md's picture: its bars are the rows' figures."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench.peers.names import FLOOR, OURS, PEAK
from bench.report import peers_figure

ENVIRONMENT = {
    "cpu": "Some processor",
    "instruction_set": "AVX512",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    "date": "2026-11-22T07:45:13+00:00",
}


def row(peer: str, ratio: float, megabytes: float, error: float = 1e-6, **others: Any) -> dict[str, Any]:
    sizes = {"num_rows": 8, "hidden_size": 4, "vocab_size": 16, "num_auxiliary": 3, "num_products": 7}
    about = {"case": "a", "operation": "unisd_loss", "divergence": "forward KL", "dtype": "float32", **sizes}
    figures = {"ratio_to_floor": ratio, "extra_peak_bytes": megabytes * 1e6, "gradient_error": error}
    return {**about, "peer": peer, **figures, **others}


def result() -> dict[str, Any]:
    # What only multiplies has a time and no memory.
    products = [row(FLOOR, 1.0, 0.0), row(PEAK, 0.7, 0.0)]
    for each in products:
        del each["extra_peak_bytes"]
    rows = [row("slow", 4.0, 50.0), *products, row("fast & loose", 1.1, 100.0, error=0.01), row(OURS, 2.0, 10.0)]
    absent = {**row("absent", 0.0, 0.0), "failure": "not on this machine"}
    return {"environment": ENVIRONMENT, "rows": [*rows, absent, row("other", 9.0, 900.0, divergence="JSD")]}


def test_bars_are_the_figures_this_package_first_then_by_time():
    svg = peers_figure.figure(result(), "a", "forward KL")
    labels = re.findall(r'text-anchor="end"[^>]*>([^<]+)<', svg)
    assert labels == 2 * [OURS, "fast &amp; loose *", "slow"]
    widths = [float(width) / peers_figure.BAR for width in re.findall(r'width="([\d.]+)" height="17"', svg)]
    assert widths == pytest.approx([2 / 4, 1.1 / 4, 1, 0.1, 1, 0.5], abs=1e-3)
    for printed in ("2.00", "1.10", "4.00", "10", "100", "50", "Some processor, AVX512, 2 threads", "K = 3 views"):
        assert f"{printed}<" in svg or f"{printed}," in svg
    # The dashed line stands where a bar of the floor's time would end.
    (line,) = re.findall(r'<path d="M([\d.]+) ', svg)
    assert float(line) == pytest.approx(peers_figure.LEFT + peers_figure.BAR / 4, abs=0.1)
    assert "off by more than" in svg


def test_without_a_figure_there_is_no_picture():
    with pytest.raises(ValueError, match="no peer has a time for a, reverse KL"):
        peers_figure.figure(result(), "a", "reverse KL")
