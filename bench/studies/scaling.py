"""`python -m bench scaling`: time and extra peak memory against N, V, H and K, each varied alone around a base shape.

Fits, by least squares over the points of a sweep:

- N, V, H: log(quantity) on log(axis). The slope is the exponent. 1: in proportion, twice the axis takes twice as much.
  0: independent of the axis. In between: a constant part and a proportional one, over this range.
- K: time is affine in K, since views are added to what a step does without any: `seconds = intercept + slope * K`, both
  in units of one bare product, which is the median over the sweep of the floor's seconds by its products. The floor has
  slope 1 and intercept 4 but for noise (student, teacher and negative view, and dh). Memory likewise, in bytes.

`standard_error` is the slope's. Rows with a failure are left out of a fit and counted. So are those without a rise of
memory where its logarithm is wanted. Fewer than three points have no fit.

Operations other than unisd_star have no views, hence no sweep of K.

Exit status 1: this package or the floor has no figure, or this package is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases import OPERATIONS, Case, shaped_case
from bench.measuring.measure import DeviceLost, measure
from bench.parser import command_parser
from bench.peers import FLOOR, OURS, PEERS
from bench.records import results_file
from bench.records.environment import chosen_device, environment
from bench.records.verdict import Row, wrong
from unisd.cli.errors import CommandError

COMPARED = (FLOOR, OURS, "dense float32", "trl composed")
# The field of a row that an axis or a quantity stands for.
AXES = {"N": "num_rows", "V": "vocab_size", "H": "hidden_size", "K": "num_auxiliary"}
QUANTITIES = {"time": "median_seconds", "memory": "extra_peak_bytes"}
FEWEST_POINTS = 3
# Rounds of peers other than the floor and this package, which take several times as long.
PEER_ROUNDS = 2


@dataclass(frozen=True)
class Plan:
    """`base`: the value of each axis while another varies; `axes`: the values of each in its own sweep."""

    base: Mapping[str, int]
    axes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    def case(self, operation: str, **changed: int) -> Case:
        shape = {**self.base, **changed}
        views = shape["K"] if has_views(operation) else 0
        return shaped_case(operation, shape["N"], shape["H"], shape["V"], views, self.dtype)

    def sweeps(self, operation: str) -> dict[str, list[Case]]:
        """The cases of each axis; the base shape is one of every sweep."""
        return {
            axis: [self.case(operation, **{axis: value}) for value in values]
            for axis, values in self.axes.items()
            if axis != "K" or has_views(operation)
        }


# About 22 times the work of the base shape.
CPU_PLAN = Plan(
    base={"N": 256, "V": 32768, "H": 576, "K": 3},
    axes={
        "N": (64, 128, 256, 512, 1024),
        "V": (8192, 16384, 32768, 65536, 131072),
        "H": (144, 288, 576, 1152),
        "K": (0, 1, 2, 3, 5, 7),
    },
    dtype=torch.float32,
)
# Llama 3.1 8B's head.
ACCELERATOR_PLAN = Plan(
    base={"N": 4096, "V": 128256, "H": 4096, "K": 3},
    axes={
        "N": (512, 1024, 2048, 4096, 8192, 16384),
        "V": (16032, 32064, 64128, 128256, 256512),
        "H": (1024, 2048, 4096, 8192),
        "K": (0, 1, 2, 3, 5, 7),
    },
    dtype=torch.bfloat16,
)


def plan_for(device: torch.device) -> Plan:
    return CPU_PLAN if device.type == "cpu" else ACCELERATOR_PLAN


def has_views(operation: str) -> bool:
    return OPERATIONS[operation]["operation"] == "unisd_loss"


@dataclass(frozen=True)
class Line:
    """`y = intercept + slope * x`."""

    intercept: float
    slope: float
    standard_error: float


def fit_line(points: Sequence[tuple[float, float]]) -> Line | None:
    """Least squares; None of fewer than three points."""
    count = len(points)
    if count < FEWEST_POINTS:
        return None
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    intercept = mean_y - slope * mean_x
    residual = sum((y - intercept - slope * x) ** 2 for x, y in points)
    return Line(intercept, slope, math.sqrt(residual / (count - 2) / spread))


def sweep_points(
    rows: Sequence[Row], sweep: Mapping[str, Any], peer: str, quantity: str
) -> tuple[list[tuple[int, float]], int]:
    """(value of the axis, quantity) of one peer in a sweep, by rising value, and how many rows are left out."""
    axis, field = AXES[sweep["axis"]], QUANTITIES[quantity]
    own = [row for row in rows if row["case"] in sweep["cases"] and row["peer"] == peer]
    points = [(row[axis], row[field]) for row in own if "failure" not in row and field in row]
    if sweep["axis"] != "K":
        points = [(x, y) for x, y in points if y > 0]
    return sorted(points), len(own) - len(points)


def peers_of(rows: Sequence[Row]) -> list[str]:
    """Peers in the order they were measured in."""
    return list(dict.fromkeys(row["peer"] for row in rows))


def fits_of(rows: Sequence[Row], sweeps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A fit for each axis, peer and quantity; the floor has no memory of its own.

    `exponent` is None for K, which has `slope`, `intercept` and their `unit` in its place.
    """
    fits = []
    for sweep in sweeps:
        for peer in peers_of(rows):
            for quantity in QUANTITIES:
                if (peer, quantity) == (FLOOR, "memory"):
                    continue
                points, left_out = sweep_points(rows, sweep, peer, quantity)
                fit = {"axis": sweep["axis"], "peer": peer, "quantity": quantity}
                if sweep["axis"] == "K":
                    fit |= _affine_fit(points, "bytes" if quantity == "memory" else "products", _product(rows, sweep))
                else:
                    line = fit_line([(math.log(x), math.log(y)) for x, y in points])
                    fit["exponent"] = line.slope if line else None
                    fit["standard_error"] = line.standard_error if line else None
                fits.append({**fit, "points": len(points), "left_out": left_out})
    return fits


def _product(rows: Sequence[Row], sweep: Mapping[str, Any]) -> float | None:
    """Seconds of one bare product in a sweep."""
    times = [
        row["median_seconds"] / row["num_products"]
        for row in rows
        if row["case"] in sweep["cases"] and row["peer"] == FLOOR and "failure" not in row
    ]
    return statistics.median(times) if times else None


def _affine_fit(points: Sequence[tuple[int, float]], unit: str, product: float | None) -> dict[str, Any]:
    scale = product if unit == "products" else 1.0
    line = fit_line([(x, y / scale) for x, y in points]) if scale else None
    return {
        "exponent": None,
        "slope": line.slope if line else None,
        "standard_error": line.standard_error if line else None,
        "intercept": line.intercept if line else None,
        "unit": unit,
    }


def table(result: Mapping[str, Any]) -> str:
    """Exponents of each axis and peer, then what a view costs."""
    fits = {(fit["axis"], fit["peer"], fit["quantity"]): fit for fit in result["fits"]}
    axes = [sweep["axis"] for sweep in result["sweeps"]]
    peers = peers_of(result["rows"])
    lines = [
        f"Around {result['base']}",
        "",
        "| axis | peer | time exponent | memory exponent |",
        "|---|---|---|---|",
    ]
    for axis in axes:
        if axis == "K":
            continue
        for peer in peers:
            cells = [_cell(fits.get((axis, peer, quantity)), "exponent") for quantity in QUANTITIES]
            lines.append(f"| {axis} | {peer} | {' | '.join(cells)} |")
    if "K" in axes:
        lines += ["", "| peer | products per view | products without views | MB per view |", "|---|---|---|---|"]
        for peer in peers:
            time, memory = (fits.get(("K", peer, quantity)) for quantity in QUANTITIES)
            intercept = "" if not time or time["intercept"] is None else f"{time['intercept']:.2f}"
            lines.append(f"| {peer} | {_cell(time, 'slope')} | {intercept} | {_cell(memory, 'slope', 1e-6)} |")
    return "\n".join(lines)


def _cell(fit: Mapping[str, Any] | None, field: str, scale: float = 1.0) -> str:
    if fit is None:
        return ""
    text = "no fit" if fit[field] is None else f"{fit[field] * scale:.2f} ± {fit['standard_error'] * scale:.2f}"
    return text + (f" ({fit['left_out']} left out)" if fit["left_out"] else "")


def result_of(
    rows: Sequence[Row], cases: Mapping[str, Sequence[Case]], base: Case, surroundings: Mapping[str, Any]
) -> dict[str, Any]:
    sweeps = [{"axis": axis, "cases": [case.name for case in of_axis]} for axis, of_axis in cases.items()]
    return {
        "environment": surroundings,
        "base": base.name,
        "rows": list(rows),
        "sweeps": sweeps,
        "fits": fits_of(rows, sweeps),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("scaling", __doc__)
    parser.add_argument("--device", default="auto", help="auto (an accelerator if there is one), cpu, cuda, ...")
    parser.add_argument("--rounds", type=int, default=3, help=f"of peers other than this package {PEER_ROUNDS}")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help=f"default: {', '.join(COMPARED)}")
    parser.add_argument("--operation", choices=list(OPERATIONS), default="unisd_star")
    parser.add_argument("--output", type=Path, help=".json file for everything, raw samples included")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.output and options.output.suffix != ".json":
        raise CommandError(f"the result is written as .json, got {options.output.name!r}")
    device = chosen_device(options.device)
    peers = tuple(dict.fromkeys((FLOOR, *options.peers))) if options.peers else COMPARED
    plan = plan_for(device)
    cases, base = plan.sweeps(options.operation), plan.case(options.operation)
    distinct = {case.name: case for of_axis in cases.values() for case in of_axis}
    surroundings = environment(device)
    # Uncounted: in its first step a peer also loads code.
    measure(min(distinct.values(), key=lambda case: case.flops), device, 1, peers, memory_apart=False)
    rows: list[dict[str, Any]] = []
    for case in distinct.values():
        lost = None
        try:
            rows += measure(case, device, options.rounds, peers, peer_rounds=min(PEER_ROUNDS, options.rounds))
        except DeviceLost as error:
            lost = error
            rows += error.rows
        result = result_of(rows, cases, base, surroundings)
        if options.output:
            results_file.write_json(options.output, result)
        if lost:
            print(lost, file=sys.stderr)
            break
    print(table(result))
    errors = wrong(rows)
    for line in errors:
        print(line)
    print(json.dumps(surroundings))
    return int(bool(errors))
