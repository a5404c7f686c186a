"""The sections of docs/benchmarks.md on one machine: a heading that names it, and every result in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.records import machine
from bench.report import plots, spread, tables
from bench.report.provenance import where
from bench.studies import certificate, ema, mixtures, numerics, scaling, steps, threads, view_formats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]


def load(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def folders(results: Path) -> list[Path]:
    """One for each machine of which there is something to show, in the order of their names."""
    found = (path for path in results.iterdir() if path.is_dir())
    return sorted(folder for folder in found if any((folder / f"{name}.json").exists() for name in shown()))


def environment_of(folder: Path) -> dict[str, Any]:
    """That of the first result there; a folder is of one machine (a test checks it)."""
    return json.loads(min(folder.glob("*.json")).read_text())["environment"]


def case_tables(result: Result) -> str:
    """Every case of a result."""
    return "\n\n".join(tables.case_tables(result["rows"]))


def training_steps(result: Result) -> str:
    """Whole steps, and what is in one."""
    notes = {row["peer"]: row["note"] for row in result["rows"]}
    lines = [f"- {peer}: {note}." for peer, note in notes.items()]
    return (
        f"All that the trainer does for one optimizer step on {result['rows'][0]['case'].removeprefix('steps.')}, the "
        f"completions the same for all; then with the sampling of them. `plain` is plain self-distillation "
        "(called sdft in results before 2026-11-25).\n\n"
        f"{steps.table(result['rows'])}\n\n" + "\n".join(lines)
    )


# Heading, name of the file, words before its tables, and what makes them.
SECTIONS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("Every peer, float32", "float32", "", case_tables),
    ("Every peer, bfloat16", "bfloat16", "", case_tables),
    (
        "A model's hidden states",
        "smollm2",
        "SmolLM2-135M's, of right replies to procedural tasks: under the bare prompt (student), with a demonstration "
        "(teacher), with a wrong one (negative), with others (auxiliary).",
        case_tables,
    ),
    ("Other heads", "heads", "", case_tables),
    ("Scaling", "scaling", "", scaling.table),
    ("Threads, cores and few rows", "threads", "", threads.table),
    ("A whole training step: the reliability tax, SmolLM2-135M", "steps_smollm2", "", training_steps),
    ("A whole training step: the reliability tax, Gemma-3-270M", "steps_gemma3", "", training_steps),
    ("A teacher that is many", "mixtures", "What it is: [mixtures.md](mixtures.md).", mixtures.table),
    (
        "Views in int8, certified",
        "certificate",
        "What it is: [design.md](design.md#views-in-int8-certified).",
        certificate.table,
    ),
    (
        "Views in FP8, certified: not built",
        "certificate_fp8",
        "What it decided: [gpu.md](gpu.md#views-in-8-bits-by-count).",
        view_formats.table,
    ),
    ("The moving average", "ema", "", ema.tables),
    ("The digits of a small divergence", "numerics", "", numerics.table),
)


def shown() -> set[str]:
    """Names of the results that a page has a section for by themselves; two runs have one together."""
    return {name for _, name, _, _ in SECTIONS} | {"ceilings"}


# The plots that a section ends with.
PLOTS = {"scaling": ("scaling_time", "scaling_memory"), "ceilings": ("roofline",)}


def page(folder: Path, results: Path) -> str:
    """Everything of one machine."""
    parts = [f"## {machine.title(environment_of(folder))}"]
    for heading, name, words, render in SECTIONS:
        result = load(folder, name)
        if result is not None:
            parts += [f"### {heading}", *([words] if words else []), render(result)]
            parts += [f"`{_named(folder / name, results)}`: {where(result['environment'])}", *_plots(folder, name)]
        if name == "heads":
            parts += _two_runs(folder, results)
        if name == "scaling":
            parts += _ceilings(folder, results)
    return "\n\n".join(parts)


def _named(path: Path, results: Path) -> str:
    return f"bench/results/{path.relative_to(results)}.json"


def _plots(folder: Path, name: str) -> list[str]:
    return [f"![{plot.replace('_', ' ')}](figures/{folder.name}/{plot}.png)" for plot in PLOTS.get(name, ())]


def plots_of(folder: Path) -> dict[str, Figure]:
    """The plots of a machine by file name, as far as there are results."""
    results = [result for name in ("scaling", "float32") if (result := load(folder, name)) is not None]
    return plots.figures(results, load(folder, "ceilings"))


def _ceilings(folder: Path, results: Path) -> list[str]:
    result = load(folder, "ceilings")
    if result is None:
        return []
    return [
        "### The machine's ceilings",
        _rates(result),
        "FLOPs of the floor over the time of each peer, at the FLOPs a byte that the least traffic allows:",
        f"`{_named(folder / 'ceilings', results)}`: {where(result['environment'])}",
        *_plots(folder, "ceilings"),
    ]


def _rates(result: Result) -> str:
    """The ceilings in numbers."""
    parts = [f"A copy moves {result['copy_gb_per_s']:.1f} GB/s"]
    parts.append(f"the library's float32 product of order {result['product_order']} does {_tflop(result, 'product')}")
    parts += [
        f"multiply-adds of {dtype} on registers alone do {_tflop(result, f'fma_{dtype}')}"
        for dtype in ("float32", "bfloat16")
        if f"fma_{dtype}_tflop_per_s" in result
    ]
    return "; ".join(parts) + "."


def _tflop(result: Result, name: str) -> str:
    return f"{result[f'{name}_tflop_per_s']:.3f} TFLOP/s"


def _two_runs(folder: Path, results: Path) -> list[str]:
    """Whether two results of the same command agree."""
    a, b = load(folder, "run_1"), load(folder, "run_2")
    if a is None or b is None:
        return []
    first, second = (_named(folder / name, results) for name in ("run_1", "run_2"))
    return [
        "### Two runs an hour apart",
        spread.page_section(a, b),
        f"`python -m bench repeat --compare {first} {second}`: {where(b['environment'])}",
    ]
