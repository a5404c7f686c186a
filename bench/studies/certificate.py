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
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import environment
from unisd.models import SMOLLM2, load_model
from unisd_kernels import LMHead, agreement_weights, linear_logprobs
from unisd_kernels.backends import extension
from unisd_kernels.certified.agreement import certified_agreement, settled
from unisd_kernels.certified.int8_head import Int8Head, ready_head
from unisd_kernels.certified.scores import THRESHOLD, LogProbBounds, logprob_bounds
from unisd_kernels.reference.certified import int8_rows

NUM_VIEWS = 3
TOLERANCES = (0.01, 0.05, 0.1)
BATCH_SIZE = 4
_ROWS = 64
# The bounds, each with what the one before it has; in the head's own coordinates, or in those that suit int8.
BOUNDS = {
    "the largest error of a logit, twice": False,
    "exact logit of the target": False,
    "exact logits of probable columns": False,
    "directions and transform": True,
    "length of the error": True,
}


class FileViews(NamedTuple):
    """Hidden states [K, N, H] of sampled completions of one file's rows, and their ids [N]."""

    file: str
    views: torch.Tensor
    ids: torch.Tensor

    def split(self) -> tuple[FileViews, FileViews]:
        """The first third of the tokens, and the others."""
        at = len(self.ids) // 3
        return (
            FileViews(self.file, self.views[:, :at], self.ids[:at]),
            FileViews(self.file, self.views[:, at:], self.ids[at:]),
        )


def sampled_views(model_name: str, files: Sequence[Path], rows: int, new_tokens: int) -> tuple[LMHead, list[FileViews]]:
    """The model's head, and the views of each file."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm

    from unisd import UniSDConfig, UniSDTrainer
    from unisd.prepare.pipeline import prepare
    from unisd.prepare.settings import PrepareSettings
    from unisd.prepare.sources import load_rows

    model, tokenizer = load_model(model_name)
    # The trainer wants something to train; without a step the adapter adds nothing.
    model = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = []
    for file in files:
        settings = PrepareSettings(negatives="none", num_auxiliary=NUM_VIEWS)
        prepared = prepare(load_rows(str(file))[: 4 * rows], settings, progress=False).rows[:rows]
        with tempfile.TemporaryDirectory() as folder:
            config = UniSDConfig(
                folder,
                preset="agreement_token",
                num_auxiliary=NUM_VIEWS,
                per_device_train_batch_size=BATCH_SIZE,
                gradient_accumulation_steps=1,
                max_steps=1,
                max_completion_length=new_tokens,
                drift_probe_every=0,
                prompt_frame="chat",
                save_strategy="no",
                report_to="none",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = UniSDTrainer(
                model=model, args=config, train_dataset=Dataset.from_list(prepared), processing_class=tokenizer
            )
            trainer.current_gradient_accumulation_steps = 1
            torch.manual_seed(0)
            parts = []
            for start in tqdm(range(0, len(prepared) - BATCH_SIZE + 1, BATCH_SIZE), desc=f"views of {file.name}"):
                with torch.no_grad():
                    batch = trainer._generate_and_score_completions(prepared[start : start + BATCH_SIZE])
                    inputs = trainer.step(trainer.model, batch, None).inputs
                parts.append((torch.stack(inputs.auxiliary_hidden), inputs.target_ids))
        views, ids = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
        found.append(FileViews(file.name, views, ids))
    weight = model.get_output_embeddings().weight.detach().clone()
    return LMHead(weight), found


class _Coordinates(NamedTuple):
    """P, W P, T^-1 (I - P P^T) and what comes of the weight in them: codes (float32), and the three norms."""

    directions: torch.Tensor
    lead: torch.Tensor
    inverse: torch.Tensor
    codes: torch.Tensor
    residual_length: float
    code_length: float
    residual_norm: float
    cross_norm: float
    gram: torch.Tensor

    @classmethod
    def plain(cls, head: LMHead) -> _Coordinates:
        """The weight as it is."""
        weight = head.active_weight
        unit, none = torch.eye(weight.shape[1], dtype=torch.float64), weight.new_zeros(weight.shape[1], 0)
        codes = int8_rows(weight)
        residual = weight - codes
        return cls(
            none.double(),
            weight @ none,
            unit,
            codes,
            float(residual.norm(dim=1).amax()),
            float(codes.norm(dim=1).amax()),
            float(torch.linalg.matrix_norm((residual.T @ residual).double(), 2).sqrt()),
            float(torch.linalg.matrix_norm(residual.T @ codes, 2)),
            (codes.T @ codes).double(),
        )

    @classmethod
    def of(cls, ready: Int8Head) -> _Coordinates:
        return cls(
            ready.directions,
            ready.lead,
            ready.inverse,
            ready.codes.float() * ready.scales.unsqueeze(-1),
            ready.residual_length,
            ready.code_length,
            ready.residual_norm,
            ready.cross_norm,
            ready.gram.double(),
        )


def bounds_of_rows(
    hidden: torch.Tensor, head: LMHead, ids: torch.Tensor, plain: _Coordinates, turned: _Coordinates
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Exact log-probabilities [n], and for each of `BOUNDS` lower and upper bounds and the error of the approximate
    log-sum-exp, [n] each in float64."""
    logits = (hidden @ head.active_weight.T).double()
    normalizer = logits.logsumexp(-1)
    target = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    found = {}
    for name, is_turned in BOUNDS.items():
        coordinates = turned if is_turned else plain
        rows = hidden.double() @ coordinates.inverse
        codes = int8_rows(rows)
        left = rows - codes
        along = (hidden.double() @ coordinates.directions).float()
        approximate = (codes.float() @ coordinates.codes.T + along @ coordinates.lead.T).double()
        length, rounded = rows.norm(dim=-1), left.norm(dim=-1)
        entry = coordinates.residual_length * length + coordinates.code_length * rounded
        squares = (coordinates.residual_norm * length).square() + torch.linalg.vecdot(left @ coordinates.gram, left)
        whole = (squares + 2 * coordinates.cross_norm * length * rounded).sqrt()
        reference = approximate.logsumexp(-1)
        error = (reference - normalizer).abs()
        if name == "the largest error of a logit, twice":
            middle = approximate.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - reference
            found[name] = (middle - 2 * entry, (middle + 2 * entry).clamp(max=0.0), error)
            continue
        share = (approximate - reference.unsqueeze(-1)).exp()
        is_exact = share > (1.0 if name == "exact logit of the target" else THRESHOLD)
        sure = torch.where(is_exact, (logits - reference.unsqueeze(-1)).exp(), 0.0).sum(-1)
        share = share.masked_fill(is_exact, 0.0)
        rest = share.sum(-1)
        most, least = sure + rest * entry.exp(), sure + rest * (-entry).exp()
        if name == "length of the error":
            first = torch.minimum(whole * share.norm(dim=-1), entry * rest)
            curve = (torch.expm1(entry) - entry) / entry.square()
            second = curve * torch.minimum(entry.square() * rest, whole.square() * THRESHOLD)
            most, least = torch.minimum(most, sure + rest + first + second), torch.maximum(least, sure + rest - first)
        at = target - reference
        found[name] = (at - most.log(), (at - least.log()).clamp(max=0.0), error)
    return target - normalizer, found


def measure(head: LMHead, files: Sequence[FileViews]) -> list[dict[str, Any]]:
    """A row for each bound."""
    from tqdm import tqdm

    halves = [each.split() for each in files]
    ready = Int8Head.of(head, torch.cat([first.views.flatten(0, 1) for first, _ in halves]))
    plain, turned = _Coordinates.plain(head), _Coordinates.of(ready)
    hidden = torch.cat([second.views for _, second in halves], 1).flatten(0, 1)
    ids = torch.cat([second.ids for _, second in halves])
    exact, parts = [], []
    for start in tqdm(range(0, len(hidden), _ROWS), desc="bounds"):
        rows = slice(start, start + _ROWS)
        scores, found = bounds_of_rows(hidden[rows], head, ids.repeat(NUM_VIEWS)[rows], plain, turned)
        exact.append(scores)
        parts.append(found)
    scores = torch.cat(exact).view(NUM_VIEWS, -1)
    out = []
    for name in BOUNDS:
        lower, upper, error = (torch.cat([part[name][place] for part in parts]) for place in range(3))
        half = (upper - lower) / 2
        outside = torch.maximum(lower - scores.flatten(), scores.flatten() - upper)
        row: dict[str, Any] = {
            "bound": name,
            "tokens": len(ids),
            "largest_error": float(error.max()),
            "half_width_median": float(half.median()),
            "half_width_p90": float(half.quantile(0.9)),
            "half_width_max": float(half.max()),
            "largest_outside": float(outside.max()),
            "rescored": {},
        }
        for tolerance in TOLERANCES:
            bounds = LogProbBounds(lower.view(NUM_VIEWS, -1).clone(), upper.view(NUM_VIEWS, -1).clone())
            cu_seqlens = torch.tensor([0, len(ids)])
            settled_at = settled(bounds, lambda places: scores[:, places], cu_seqlens, tolerance=tolerance, gamma=1.0)
            row["rescored"][str(tolerance)] = float(settled_at.rescored.double().mean())
        out.append(row)
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


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("certificate", __doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--rows", type=int, default=16, help="of each file")
    parser.add_argument("--new_tokens", type=int, default=32, help="longest completion")
    parser.add_argument("--rounds", type=int, default=5, help="of the times; 0 for none")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the kernel's times")
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    options = parser.parse_args(list(arguments))
    head, files = sampled_views(options.model, options.files, options.rows, options.new_tokens)
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "model": Path(options.model).name,
        "files": [file.file for file in files],
        "rows": measure(head, files),
        "seconds": times(head, files, options.rounds) if options.rounds else {},
    }
    if extension.cpu_unavailable() is None and extension.cpu_multiplies_int8():
        result["kernel"] = kernel_against_exact(head, files)
        if options.rounds:
            result["kernel_seconds"] = kernel_times(head, files, options.rounds, options.threads)
    result["environment"]["command"] = result["environment"]["command"].replace(f"{options.files[0].parent}/", "")
    print(f"{table(result)}\n\n{json.dumps(result['environment'])}")
    if options.output:
        results_file.write_json(options.output, result)
    return 0
