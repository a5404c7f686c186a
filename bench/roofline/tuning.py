"""`python -m bench tuning --device cuda --output FILE`: every tile shape of the product kernels, timed on this GPU.

For each kind and shape the milliseconds of each candidate of `backends/triton/configs.py`, beside the bare library
products of as many FLOPs; so that the table's defaults, which are reasoned, meet a measurement. The launch alone is
timed, by the package's own `choose`. A candidate that fails is shown with its reason. The user's cache is left alone.

    python -m bench tuning --dry-run            what would be measured on a Hopper; needs no GPU
    python -m bench tuning --report FILE        the table of an earlier run

Exit status: 0; 1 if a default failed; 2 where there is nothing to measure on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from bench.measuring.deadline import NO_DEADLINE, Deadline
from bench.measuring.measure import device_lost
from bench.parser import gpu_command_parser
from bench.records import results_file
from bench.records.environment import environment
from bench.records.failures import OUT_OF_TIME, failure_text
from bench.roofline.expected import ARCHITECTURE
from bench.roofline.tuning_candidates import milliseconds
from bench.roofline.tuning_shapes import SHAPES, Shape, library_products, operation
from unisd_kernels.backends.triton.configs import TABLE, GemmConfig, candidates

# Milliseconds of one candidate: kind, candidate, device, what runs the operation once.
Timer = Callable[[str, GemmConfig, torch.device, Callable[[], object]], float]


def describe(config: GemmConfig) -> str:
    """The tile, and what of it is not the default."""
    parts = [f"{config.rows}x{config.columns}x{config.width}", f"{config.warps} warps", f"{config.stages} stages"]
    parts += [f"{name} {getattr(config, name)}" for name in ("parts", "occupancy") if getattr(config, name) != 1]
    parts += [name for name in ("descriptors", "flatten", "warp_specialize") if getattr(config, name)]
    return ", ".join(parts)


def library_milliseconds(shape: Shape, device: torch.device) -> float:
    products = library_products(shape, device)
    return float(triton.testing.do_bench(products, warmup=5, rep=50, return_mode="median"))


def measure_shape(
    shape: Shape, device: torch.device, deadline: Deadline, timer: Timer = milliseconds
) -> list[dict[str, Any]]:
    """A row for each candidate; the first is the shipped default.

    Raises: what making the operands raises. A candidate that raises is a row with the reason.
    """
    rows: list[dict[str, Any]] = []
    step = None if deadline.passed() else operation(shape, device)
    lost: str | None = None
    for position, config in enumerate(candidates(shape.kind, device)):
        row: dict[str, Any] = {"tile": describe(config), "config": asdict(config), "default": position == 0}
        if lost is not None:
            row["failure"] = f"not timed: the device was lost before ({lost})"
        elif step is None or deadline.passed():
            row["failure"] = OUT_OF_TIME
        else:
            try:
                row["milliseconds"] = timer(shape.kind, config, device, step)
            except Exception as error:
                row["failure"] = failure_text(error)
                lost = device_lost(device)
        rows.append(row)
    times = [row["milliseconds"] for row in rows if "milliseconds" in row]
    for row in rows:
        row["won"] = "milliseconds" in row and row["milliseconds"] == min(times)
        if "milliseconds" in row:
            row["tflop_per_s"] = shape.flops / row["milliseconds"] / 1e9
    return rows


def run(
    shapes: Sequence[Shape],
    device: torch.device,
    deadline: Deadline,
    output: Path | None,
    timer: Timer = milliseconds,
    library: Callable[[Shape, torch.device], float] = library_milliseconds,
) -> int:
    """Measure in order, keep `output` up to date; returns the exit status."""
    result: dict[str, Any] = {"environment": environment(device), "shapes": []}
    for shape in shapes:
        entry: dict[str, Any] = {**shape.as_json(), "candidates": []}
        result["shapes"].append(entry)
        try:
            entry["candidates"] = measure_shape(shape, device, deadline, timer)
            if not deadline.passed():
                entry["library_milliseconds"] = library(shape, device)
                entry["library_tflop_per_s"] = shape.flops / entry["library_milliseconds"] / 1e9
        except Exception as error:
            # One shape's trouble, such as too little memory, shall not cost the others.
            entry["failure"] = failure_text(error)
        if device.type == "cuda" and device_lost(device) is None:
            torch.cuda.empty_cache()
        if output is not None:
            results_file.write_json(output, result)
    print(table(result))
    return int(any(_failed(entry) for entry in result["shapes"]))


def _failed(entry: dict[str, Any]) -> bool:
    defaults = [row.get("failure") for row in entry["candidates"] if row["default"]]
    return "failure" in entry or any(failure not in (None, OUT_OF_TIME) for failure in defaults)


def table(result: dict[str, Any]) -> str:
    lines = [
        f"Tiles on {result['environment']['device']}, triton {result['environment']['versions']['triton']}; "
        "milliseconds of the launch alone.",
        "",
        "| kind | shape (rows x H x V) | tile | ms | TFLOP/s | of the library's rate | |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in result["shapes"]:
        shape = f"{entry['name']}: {entry['rows']} x {entry['width']} x {entry['columns']}"
        floor = entry.get("library_milliseconds")
        for row in entry["candidates"]:
            marks = ", ".join(name for name in ("default", "won") if row[name])
            cells = [row["failure"], "", ""] if "failure" in row else _cells(row["milliseconds"], floor, entry)
            lines.append(f"| {' | '.join([entry['kind'], shape, row['tile'], *cells, marks])} |")
        if "failure" in entry:
            lines.append(f"| {entry['kind']} | {shape} | | {entry['failure']} | | | |")
        if floor is not None:
            name = f"library, {entry['views']} product{'s' if entry['views'] > 1 else ''}"
            lines.append(f"| {' | '.join([entry['kind'], shape, name, *_cells(floor, floor, entry), ''])} |")
    return "\n".join(lines)


def _cells(duration: float, floor: float | None, entry: dict[str, Any]) -> list[str]:
    share = "" if floor is None else f"{floor / duration:.2f}"
    return [f"{duration:.3g}", f"{entry['flops'] / duration / 1e9:.0f}", share]


def listing() -> str:
    """Every candidate of the architecture that the shapes are for."""
    lines = []
    for shape in SHAPES:
        lines.append(f"{shape.kind}, {shape.name}: {shape.rows} x {shape.width} x {shape.columns}")
        lines += [f"  {describe(config)}" for config in TABLE[ARCHITECTURE][shape.kind]]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = gpu_command_parser("tuning", __doc__)
    parser.add_argument("--deadline", type=float, help="seconds after which no candidate is begun")
    parser.add_argument("--dry-run", action="store_true", help=f"list what would be measured on {ARCHITECTURE}")
    options = parser.parse_args(arguments)
    if options.report:
        print(table(results_file.read(options.report)))
        return 0
    device = torch.device(options.device)
    if options.dry_run:
        print(listing())
        return 0
    if device.type == "cpu":
        parser.error(
            "tiles are timed on a GPU; on a CPU kernels run under Triton's interpreter, whose times say "
            "nothing. --dry-run lists what would be measured"
        )
    if not torch.cuda.is_available():
        parser.error(f"--device {device}: there is no CUDA device here. --dry-run lists what would be measured")
    if options.output is None:
        parser.error("--output FILE is needed")
    deadline = NO_DEADLINE if options.deadline is None else Deadline(options.deadline)
    return run(SHAPES, device, deadline, options.output)
