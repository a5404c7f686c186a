"""`python -m bench certificate FILE ...`: how sure int8 scores of the views make the agreement weights.

    python -m bench certificate cos_e_train.jsonl mbpp.jsonl scienceqa_train.jsonl

The views are the trainer's: rows prepared from each file, completions sampled from the model, read under K = 3 contexts
with other rows' solved examples. The first third of each file's tokens prepares the head, the others are scored. For
each bound, from the simplest to the one of `unisd_kernels.reference.certified`: half the width of the interval of a
log-probability, and the share of tokens that have to be scored again, exactly, for every agreement weight to be within
a tolerance (gamma = 1, token level, variance). Then, where the processor has the instruction, the C++ kernel's own
intervals and weights beside the exact ones. Then times in one interleaved run: bare products in float32, bfloat16 and
int8, float32 scoring by the C++ backend, and certified scoring; and of the kernel against float32 scoring for some
numbers of threads, everything included that a call of `unisd_loss` with `views_dtype="int8"` pays for its views.

    python -m bench certificate cos_e_train.jsonl --formats

The same intervals from FP8 codes beside those from int8, with other choices of exact columns, and no times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import environment
from bench.studies import view_formats
from bench.studies.sampled_views import NUM_VIEWS, FileViews, sampled_views
from bench.studies.view_bounds import TOLERANCES, Coordinates, RowScores, rescored, spread_of
from unisd.models import SMOLLM2
from unisd_kernels import LMHead, agreement_weights, linear_logprobs
from unisd_kernels.backends import extension
from unisd_kernels.certified.agreement import certified_agreement
from unisd_kernels.certified.int8_head import Int8Head, ready_head
from unisd_kernels.certified.scores import THRESHOLD, LogProbBounds, logprob_bounds
from unisd_kernels.reference.certified import int8_rows

_ROWS = 64
# The bounds, each with what the one before it has; in the head's own coordinates, or in those that suit int8.
BOUNDS = {
    "the largest error of a logit, twice": False,
    "exact logit of the target": False,
    "exact logits of probable columns": False,
    "directions and transform": True,
    "length of the error": True,
}


def bounds_of_rows(
    hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, plain: Coordinates, turned: Coordinates
) -> tuple[torch.Tensor, dict[str, tuple[LogProbBounds, torch.Tensor]]]:
    """Exact log-probabilities [n], and for each of `BOUNDS` the interval and the error of the approximate log-sum-exp,
    [n] each in float64."""
    in_plain, in_turned = (RowScores.of(hidden, head, ids, at, int8_rows) for at in (plain, turned))
    found = {}
    for name, is_turned in BOUNDS.items():
        rows = in_turned if is_turned else in_plain
        is_exact = rows.share > (1.0 if name == "exact logit of the target" else THRESHOLD)
        if name == "the largest error of a logit, twice":
            bounds = rows.simple_interval()
        else:
            bounds = rows.interval(is_exact, THRESHOLD if name == "length of the error" else None)
        found[name] = (bounds, rows.error)
    return in_plain.exact, found


def measure(head: LMHead, files: Sequence[FileViews]) -> list[dict[str, Any]]:
    """A row for each bound."""
    from tqdm import tqdm

    halves = [each.split() for each in files]
    ready = Int8Head.of(head, torch.cat([first.views.flatten(0, 1) for first, _ in halves]))
    plain, turned = Coordinates.plain(head), Coordinates.of(ready)
    hidden = torch.cat([second.views for _, second in halves], 1).flatten(0, 1)
    ids = torch.cat([second.ids for _, second in halves])
    exact, parts = [], []
    for start in tqdm(range(0, len(hidden), _ROWS), desc="bounds"):
        rows = slice(start, start + _ROWS)
        scores, found = bounds_of_rows(hidden[rows], head, ids.repeat(NUM_VIEWS)[rows], plain, turned)
        exact.append(scores)
        parts.append(found)
    scores = torch.cat(exact)
    out = []
    for name in BOUNDS:
        bounds = LogProbBounds(*(torch.cat([part[name][0][place] for part in parts]) for place in range(2)))
        of_views = LogProbBounds(*(values.view(NUM_VIEWS, -1) for values in bounds))
        out.append(
            {
                "bound": name,
                "tokens": len(ids),
                "largest_error": float(torch.cat([part[name][1] for part in parts]).max()),
                **spread_of(bounds, scores),
                "rescored": rescored(of_views, scores.view(NUM_VIEWS, -1)),
            }
        )
    return out


def times(head: LMHead, files: Sequence[FileViews], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each way of scoring all views, in turns."""
    views, ids, bounds, score = _all_views(head, files)
    hidden, weight = torch.cat(views), head.active_weight
    ready = Int8Head.of(head, torch.cat([each.split()[0].views.flatten(0, 1) for each in files]))
    narrow = (hidden.bfloat16(), weight.bfloat16())
    codes = ready.codes[torch.arange(len(hidden)) % len(ready.codes)]

    def product(function: Callable[[slice], object]) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, len(weight), 8192):
                function(slice(start, start + 8192))

        return run

    def certified() -> object:
        return certified_agreement(views, ready, ids, bounds, score=score, tolerance=0.05, gamma=1.0)

    steps: dict[str, Callable[[], object]] = {
        "float32 product": product(lambda tile: functional.linear(hidden, weight[tile])),
        "bfloat16 product": product(lambda tile: functional.linear(narrow[0], narrow[1][tile])),
        "int8 product": product(lambda tile: torch._int_mm(codes, ready.codes[tile].T)),
        "float32 scoring": lambda: score(hidden, ids.repeat(NUM_VIEWS)),
        "certified scoring in PyTorch, tolerance 0.05": certified,
        "preparation of the head": lambda: Int8Head.of(head, hidden[: len(hidden) // 3]),
    }
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number:
                samples[name].append(time.process_time() - began)
    return samples


def kernel_against_exact(head: LMHead, files: Sequence[FileViews]) -> dict[str, Any]:
    """The kernel over the views that did not prepare the head: its intervals against exact scores, and its weights for
    each tolerance."""
    views, ids, bounds, score = _all_views(head, [each.split()[1] for each in files])
    ready = ready_head(head, torch.cat([each.split()[0].views.flatten(0, 1) for each in files]))
    scores = torch.stack([score(view, ids) for view in views])
    intervals = [logprob_bounds(view, ready, ids, impl="native") for view in views]
    lower, upper = (torch.stack([getattr(each, name) for each in intervals]) for name in ("lower", "upper"))
    exact = agreement_weights(scores, bounds, gamma=1.0).weights
    out: dict[str, Any] = {
        "tokens": len(ids),
        "largest_outside": float(torch.maximum(lower - scores, scores - upper).max()),
        "half_width_median": float(((upper - lower) / 2).median()),
        "half_width_max": float(((upper - lower) / 2).max()),
        "weight_error": {},
        "rescored": {},
    }
    for tolerance in TOLERANCES:
        found = certified_agreement(
            views, ready, ids, bounds, score=score, tolerance=tolerance, gamma=1.0, impl="native"
        )
        out["weight_error"][str(tolerance)] = float((found.weights - exact).abs().max())
        out["rescored"][str(tolerance)] = float(found.rescored.double().mean())
    return out


def kernel_times(head: LMHead, files: Sequence[FileViews], rounds: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds of both ways of scoring the same views, in turns, for each number of threads."""
    views, ids, bounds, score = _all_views(head, [each.split()[1] for each in files])
    prepared = torch.cat([each.split()[0].views.flatten(0, 1) for each in files])

    def certified() -> object:
        # With the look whether the weight is still the one that the codes are of.
        ready = ready_head(head, prepared)
        return certified_agreement(views, ready, ids, bounds, score=score, tolerance=0.05, gamma=1.0, impl="native")

    steps = {"float32": lambda: [score(view, ids) for view in views], "int8": certified}
    before, out = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            samples: dict[str, list[float]] = {name: [] for name in steps}
            for number in range(rounds + 1):
                for name, step in steps.items():
                    began = time.perf_counter()
                    step()
                    if number:
                        samples[name].append(time.perf_counter() - began)
            out.append({"threads": count, "rows": len(views) * len(ids), **samples})
    finally:
        torch.set_num_threads(before)
    return out


def _all_views(
    head: LMHead, files: Sequence[FileViews]
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Views, ids and offsets of all files' tokens as one sequence, and exact scoring."""
    views = tuple(torch.cat([each.views for each in files], 1))
    ids = torch.cat([each.ids for each in files])

    def score(rows: torch.Tensor, of_ids: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(rows, head, of_ids).logprobs

    return views, ids, torch.tensor([0, len(ids)]), score


def table(result: dict[str, Any]) -> str:
    """Markdown: bounds, then times."""
    rows = result["rows"]
    tolerances = list(rows[0]["rescored"])
    lines = [
        f"{result['model']}, {rows[0]['tokens']} sampled tokens under K = {NUM_VIEWS} contexts; rows from "
        f"{', '.join(result['files'])}. Half widths in nats; shares of tokens scored again for a tolerance:",
        "",
        "| each with what the one above has | error of log-sum-exp, largest | half width, median | 0.9 | largest | "
        + " | ".join(tolerances)
        + " |",
        "|---" * (5 + len(tolerances)) + "|",
    ]
    for row in rows:
        cells = [
            f"{row[name]:.2g}" for name in ("largest_error", "half_width_median", "half_width_p90", "half_width_max")
        ]
        shares = [f"{share:.1%}" for share in row["rescored"].values()]
        lines.append(f"| {' | '.join([row['bound'], *cells, *shares])} |")
    if result["seconds"]:
        floor = result["seconds"]["float32 product"]
        lines += ["", "| CPU time as a multiple of the float32 product's | median |", "|---|---|"]
        for name, samples in result["seconds"].items():
            ratios = sorted(sample / base for sample, base in zip(samples, floor, strict=True))
            lines.append(f"| {name} | {ratios[len(ratios) // 2]:.2f} |")
    lines += _kernel_lines(result)
    return "\n".join(lines)


def _kernel_lines(result: dict[str, Any]) -> list[str]:
    """What the C++ kernel makes of the views, where it was measured."""
    kernel, lines = result.get("kernel"), []
    if kernel is not None:
        lines += [
            "",
            f"The C++ kernel, {kernel['tokens']} tokens: half width {kernel['half_width_median']:.2g} in the median, "
            f"{kernel['half_width_max']:.2g} at most; exact scores are outside by {kernel['largest_outside']:.1e} nats "
            "at most (below 0: inside).",
            "",
            "| tolerance | largest error of a weight | tokens scored again |",
            "|---|---|---|",
        ]
        for tolerance, error in kernel["weight_error"].items():
            lines.append(f"| {tolerance} | {error:.1e} | {kernel['rescored'][tolerance]:.1%} |")
    if result.get("kernel_seconds"):
        lines += [
            "",
            "| the kernel at tolerance 0.05, wall time | float32 scoring, ms | int8, ms | times as fast |",
            "|---|---|---|---|",
        ]
        for row in result["kernel_seconds"]:
            exact, int8 = (sorted(row[name])[len(row[name]) // 2] for name in ("float32", "int8"))
            cells = f"{1e3 * exact:.0f} | {1e3 * int8:.0f} | {exact / int8:.2f}"
            lines.append(f"| {row['rows']} rows, threads: {row['threads']} | {cells} |")
    return lines


def measured(head: LMHead, files: Sequence[FileViews], rounds: int, threads: Sequence[int]) -> dict[str, Any]:
    """Bounds, and for more than 0 rounds times; the kernel's where this processor runs it."""
    result: dict[str, Any] = {
        "rows": measure(head, files),
        "seconds": times(head, files, rounds) if rounds else {},
    }
    if extension.cpu_unavailable() is None and extension.cpu_multiplies_int8():
        result["kernel"] = kernel_against_exact(head, files)
        if rounds:
            result["kernel_seconds"] = kernel_times(head, files, rounds, threads)
    return result


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("certificate", __doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--rows", type=int, default=16, help="of each file")
    parser.add_argument("--new_tokens", type=int, default=32, help="longest completion")
    parser.add_argument("--rounds", type=int, default=5, help="of the times; 0 for none")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the kernel's times")
    parser.add_argument("--formats", action="store_true", help="FP8 beside int8, and no times")
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    options = parser.parse_args(list(arguments))
    head, files = sampled_views(options.model, options.files, options.rows, options.new_tokens)
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "model": Path(options.model).name,
        "files": [file.file for file in files],
    }
    if options.formats:
        result |= view_formats.measure(head, files)
    else:
        result |= measured(head, files, options.rounds, options.threads)
    result["environment"]["command"] = result["environment"]["command"].replace(f"{options.files[0].parent}/", "")
    words = view_formats.table(result) if options.formats else table(result)
    print(f"{words}\n\n{json.dumps(result['environment'])}")
    if options.output:
        results_file.write_json(options.output, result)
    return 0
