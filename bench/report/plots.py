"""`python -m bench plots FILE.json... --output DIR`: result files as plots.

A result of `scaling`: `scaling_time.png` and `scaling_memory.png`, a panel for each axis (log-log; K linear). Time is
in milliseconds on an accelerator. On a CPU, whose times say little of another's, it is a multiple of the floor's time
at the largest shape of the panel.

Results of `run` or `suite`: `roofline.png`, the achieved rate against arithmetic intensity, which is FLOPs of the
floor by the least bytes a step can read. The roof is the copy bandwidth and the product rate of `--ceilings`, a
file of `ceilings`; without it the floor's best rate.

A peer has the same colour and marker in every plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator

from bench.cases import Case
from bench.parser import command_parser
from bench.peers import FLOOR, PEERS
from bench.records import results_file
from bench.records.verdict import Row
from bench.report.tables import tflop_per_s
from bench.studies.scaling import peers_of, sweep_points
from unisd.cli.errors import CommandError

DOTS_PER_INCH = 100
# Okabe and Ito's colours, which colour-blind readers tell apart, with grey for the yellow that white swallows.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#999999")
MARKERS = "osD^vPX*"
AXIS_TITLES = {"N": "rows N", "V": "vocabulary V", "H": "hidden size H", "K": "auxiliary views K"}


def style(peer: str) -> dict[str, Any]:
    """Colour and marker. Peers that share a colour have different markers; one not known is a grey cross."""
    if peer not in PEERS:
        return {"color": COLOURS[-1], "marker": "x"}
    index = list(PEERS).index(peer)
    turns, colour = divmod(index, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[(index + turns) % len(MARKERS)]}


def scaling_time(result: Mapping[str, Any]) -> Figure:
    figure, panels = _panels(result, "Time of one step")
    absolute = result["environment"]["device"] != "cpu"
    for axes, sweep in panels:
        of_floor, _ = sweep_points(result["rows"], sweep, FLOOR, "time")
        if absolute:
            unit = 1e-3
            axes.set_ylabel("time, ms")
        elif of_floor:
            largest, unit = of_floor[-1]
            axes.set_ylabel(f"time / floor's time at {sweep['axis']} = {largest}")
        else:
            axes.set_ylabel("time: no floor to divide by")
            continue
        _draw_sweep(axes, result["rows"], sweep, "time", unit)
    return _finished(figure)


def scaling_memory(result: Mapping[str, Any]) -> Figure:
    figure, panels = _panels(result, "Extra peak memory of one step")
    for axes, sweep in panels:
        axes.set_ylabel("extra peak memory, MB")
        _draw_sweep(axes, result["rows"], sweep, "memory", 1e6)
    return _finished(figure)


def _panels(result: Mapping[str, Any], title: str) -> tuple[Figure, list[tuple[Axes, Mapping[str, Any]]]]:
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}, around {result['base']}", fontsize=11)
    sweeps = result["sweeps"]
    grid = figure.subplots(2, 2).flat
    panels = list(zip(grid, sweeps, strict=False))
    for unused in list(figure.axes)[len(sweeps) :]:
        unused.remove()
    for axes, sweep in panels:
        axes.set_xlabel(AXIS_TITLES[sweep["axis"]])
    return figure, panels


def _draw_sweep(axes: Axes, rows: Sequence[Row], sweep: Mapping[str, Any], quantity: str, unit: float) -> None:
    values: set[int] = set()
    for peer in peers_of(rows):
        points, _ = sweep_points(rows, sweep, peer, quantity)
        if points:
            axes.plot([x for x, _ in points], [y / unit for _, y in points], label=peer, markersize=5, **style(peer))
            values.update(x for x, _ in points)
    if sweep["axis"] == "K":
        axes.set_ylim(bottom=0)
    elif values:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_numbers(axes)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(values), [str(value) for value in sorted(values)])
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)


class PlainNumbers(LogFormatter):
    """0.2 rather than 2 x 10^-1, at the ticks that have room for a label."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PlainNumbers())
    axes.yaxis.set_minor_formatter(PlainNumbers())
    axes.tick_params(axis="y", which="minor", labelsize=8)


def roofline(rows: Sequence[Row], ceilings: Mapping[str, float] | None = None) -> Figure:
    """Every row with a time is a point; a peer's rows are one line's data, without the line."""
    timed = [row for row in rows if "failure" not in row]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title("Achieved rate against the roof", fontsize=11)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes)
    axes.set_xlabel("arithmetic intensity, FLOP / least bytes read")
    axes.set_ylabel("FLOPs of the floor by time, TFLOP/s")
    axes.grid(alpha=0.3)
    for peer in peers_of(timed):
        points = [(intensity(row), tflop_per_s(row)) for row in timed if row["peer"] == peer]
        axes.plot([x for x, _ in points], [y for _, y in points], linestyle="", label=peer, **style(peer))
    intensities = [intensity(row) for row in timed]
    if intensities:
        _draw_roof(axes, timed, min(intensities), max(intensities), ceilings)
    return _finished(figure)


def _draw_roof(axes: Axes, rows: Sequence[Row], low: float, high: float, ceilings: Mapping[str, float] | None) -> None:
    if ceilings is None:
        of_floor = [tflop_per_s(row) for row in rows if row["peer"] == FLOOR]
        if of_floor:
            rate = max(of_floor)
            axes.plot(
                [low / 2, high * 2], [rate, rate], "--", color="#555555", label=f"floor's best, {rate:.3g} TFLOP/s"
            )
        return
    rate, bandwidth = ceilings["product_tflop_per_s"], ceilings["copy_gb_per_s"] / 1e3
    ridge = rate / bandwidth
    left, right = min(low, ridge) / 2, max(high, ridge) * 2
    axes.plot([left, ridge], [left * bandwidth, rate], ":", color="#555555", label=f"copy, {1e3 * bandwidth:.3g} GB/s")
    axes.plot([ridge, right], [rate, rate], "--", color="#555555", label=f"product, {rate:.3g} TFLOP/s")


def intensity(row: Row) -> float:
    """FLOPs of the floor by the least bytes read."""
    known = {field.name: row[field.name] for field in fields(Case) if field.name in row}
    case = Case(**{**known, "name": row["case"], "dtype": getattr(torch, row["dtype"])})
    return case.flops / case.bytes_read


def _finished(figure: Figure) -> Figure:
    """With one legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            handles=list(entries.values()), labels=list(entries), loc="outside lower center", ncols=4, fontsize=9
        )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save a figure as PNG. The same figure gives the same bytes with the same matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})


def figures(results: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any] | None = None) -> dict[str, Figure]:
    """By file name, what the results allow.

    Raises:
        ValueError: several scaling results, or roofs and points of several devices.
    """
    scaling = [result for result in results if "sweeps" in result]
    ordinary = [result for result in results if "sweeps" not in result]
    if len(scaling) > 1:
        raise ValueError("one scaling result at a time: its plots have fixed names")
    devices = {result["environment"]["device"] for result in ordinary}
    if ordinary and ceilings is not None:
        devices.add(ceilings["device"])
    if len(devices) > 1:
        raise ValueError(f"a roofline is of one device, not of {', '.join(sorted(devices))}")
    drawn = {}
    for result in scaling:
        drawn["scaling_time.png"] = scaling_time(result)
        drawn["scaling_memory.png"] = scaling_memory(result)
    if ordinary:
        drawn["roofline.png"] = roofline([row for result in ordinary for row in result["rows"]], ceilings)
    return drawn


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("plots", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--ceilings", type=Path, help="file of the command ceilings, for the roofline")
    parser.add_argument("--output", type=Path, required=True, help="directory of the plots")
    options = parser.parse_args(arguments)
    ceilings = results_file.read(options.ceilings) if options.ceilings else None
    try:
        drawn = figures([results_file.read(path) for path in options.files], ceilings)
    except ValueError as error:
        raise CommandError(str(error)) from None
    for name, figure in drawn.items():
        save(figure, options.output / name)
        print(options.output / name)
    return 0
