"""The two ceilings of a device: memory copy and matrix product, measured. Every other figure is read against them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.measuring.timing import interleaved_seconds
from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import environment
from bench.records.failures import NotHere
from bench.roofline import fma_peak

REPETITIONS = 7


def measure(device: torch.device, rounds: int = 10) -> dict[str, float]:
    """GB/s of a device-to-device copy (bytes read plus bytes written) and TFLOP/s of a square product of random data:
    bfloat16 on an accelerator, float32 on a CPU."""
    on_cpu = device.type == "cpu"
    size = 1 << 26 if on_cpu else 1 << 32
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    order = 4096 if on_cpu else 8192
    dtype = torch.float32 if on_cpu else torch.bfloat16
    a, b = (torch.randn(order, order, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    samples = interleaved_seconds(
        {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}, rounds, device
    )
    peaks = _register_rates() if on_cpu else {}
    return {
        **peaks,
        "copy_gb_per_s": 2 * size / statistics.median(samples["copy"]) / 1e9,
        "product_tflop_per_s": 2 * order**3 / statistics.median(samples["product"]) / 1e12,
        "product_order": order,
    }


def _register_rates() -> dict[str, float]:
    """TFLOP/s of multiply-adds on registers alone, where this processor has such instructions."""
    threads, flops, rates = torch.get_num_threads(), 20_000_000_000, {}
    for dtype in (torch.float32, torch.bfloat16):
        try:
            loop = fma_peak.loop(dtype)
        except NotHere:
            continue
        seconds = [_seconds(lambda loop=loop: loop.run(flops, threads)) for _ in range(REPETITIONS)]  # type: ignore[misc]
        rates[f"fma_{str(dtype).removeprefix('torch.')}_tflop_per_s"] = flops / statistics.median(seconds) / 1e12
    return rates


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("ceilings", __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    surroundings = environment(device)
    result = {"device": surroundings["device"], **measure(device), "environment": surroundings}
    print(json.dumps(result))
    if options.output:
        results_file.write_json(options.output, result)
    return 0
