"""`python -m bench pooled-steps`: what K = 3 auxiliary contexts cost a training step where they come from a pool of
fixed sets (`--context_pool`), whose keys and values are kept between two updates of the teacher.

Contexts are `--ratio` times as long as the completion: the solved examples before the question, and the teacher's text
as well. No rollout; completions are given. The teacher is the base, whose weights never move; with a moving average
each set is read once more after every update. Each round runs plain self-distillation and every variant in turn;
figures are medians over rounds of the ratio to plain within a round. By count of tokens (forward 1, backward 2):

    plain           c + T + 3 (p + T)                        c context, T completion, p prompt
    K contexts      plain + K (c + p + T)
    K from a pool   plain + K (p + T)
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.parser import command_parser
from bench.records import results_file
from bench.records.environment import chosen_device, environment
from bench.studies.step_runs import NUM_AUXILIARY, OURS, PLAIN, VARIANTS, Workbench, fresh_rows, make_workbench
from unisd.models import SMOLLM2

SETS = 4
BAR = 1.45
CASES = {
    "plain": (PLAIN, "padded"),
    "own contexts, padded": ("agreement_token", "padded"),
    "own contexts": ("agreement_token", "prefix"),
    "pool": ("agreement_token", "prefix"),
}


def main(arguments: Sequence[str]) -> int:
    parser = command_parser("pooled-steps", __doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--ratio", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(list(arguments))
    device = chosen_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        bench = make_workbench(options.model, device, options.batch_size, options.new_tokens, folder)
        result = measure(bench, options.ratio, options.rounds)
    result = {**result, "environment": environment(device), "options": {k: str(v) for k, v in vars(options).items()}}
    print("\n".join(table(result)))
    if options.output:
        results_file.write_json(options.output, result)
    return 0


def measure(bench: Workbench, ratio: int, rounds: int) -> dict[str, Any]:
    """Ratios to plain self-distillation by case, and tokens by count."""
    torch.manual_seed(0)
    completions = bench.trainer(PLAIN, OURS).rollout(bench.rows)
    length = ratio * bench.new_tokens
    # Every round has questions of its own: what one round's rows begin with must not help the next, but for the pool.
    fresh = [fresh_rows(len(bench.rows), number) for number in range(rounds + 1)]
    rows = {name: [_rows(bench, each, n, length, name == "pool") for n, each in enumerate(fresh)] for name in CASES}
    runs = {}
    for name, (variant, passes) in CASES.items():
        own = Workbench(bench.model, bench.tokenizer, rows[name][0], bench.new_tokens, bench.folder)
        VARIANTS[name] = {**VARIANTS[variant], "view_passes": passes, "teacher": "base"}
        runs[name] = own.trainer(name, OURS, completions)
    ratios: dict[str, list[float]] = {name: [] for name in CASES}
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run.optimizer_step(rows[name][number])
            if bench.model.device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first fills caches
                seconds[name].append(time.perf_counter() - started)
        if number:
            for name in CASES:
                ratios[name].append(seconds[name][-1] / seconds["plain"][-1])
    return {
        "ratio_to_plain": {name: statistics.median(values) for name, values in ratios.items()},
        "by_count": _counts(bench, {name: each[-1] for name, each in rows.items()}, completions),
        "samples_seconds": seconds,
        "bar": BAR,
    }


def table(result: dict[str, Any]) -> list[str]:
    """For a terminal."""
    lines = [f"{'case':<22} {'time / plain':>12} {'by count':>9}"]
    for name, value in result["ratio_to_plain"].items():
        lines.append(f"{name:<22} {value:>12.2f} {result['by_count'][name]:>9.2f}")
    return [*lines, f"bar for the pool: {result['bar']}"]


def _rows(bench: Workbench, base: list[dict[str, Any]], number: int, length: int, pooled: bool) -> list[dict[str, Any]]:
    """Rows whose teacher's text and solved examples have about `length` tokens before what follows them; the sets of
    a pool are the same in every round, other examples are the round's own."""
    source = bench.rows if pooled else base
    texts = [row["auxiliary_prompts"][k] for row in source for k in range(NUM_AUXILIARY)]
    own = [row["auxiliary_prompts"][k] for row in base for k in range(NUM_AUXILIARY)]

    def filled(examples: list[str], start: int, end: str) -> str:
        text, place = "", start
        while len(bench.tokenizer(text)["input_ids"]) < length:
            text += examples[place % len(examples)] + "\n\n"
            place += 1
        ids = bench.tokenizer(text)["input_ids"][:length]
        return bench.tokenizer.decode(ids) + "\n\n" + end

    made = []
    for place, row in enumerate(base):
        sets = [(place + k) % SETS if pooled else NUM_AUXILIARY * place + k for k in range(NUM_AUXILIARY)]
        made.append(
            {
                **row,
                "teacher_prompt": filled(own, 5 * place + number + 1, row["teacher_prompt"]),
                "auxiliary_prompts": [filled(texts, one, row["prompt"]) for one in sets],
            }
        )
    return made


def _counts(bench: Workbench, rows: dict[str, list[dict[str, Any]]], completions: list[list[int]]) -> dict[str, float]:
    """Tokens that go through the backbone, a backward pass counted as two, over those of plain self-distillation."""

    def size(text: str) -> int:
        return len(bench.tokenizer(text)["input_ids"])

    counts = {}
    for name in CASES:
        total = 0
        for row, completion in zip(rows[name], completions, strict=True):
            reply, prompt = len(completion), size(row["prompt"])
            total += size(row["teacher_prompt"]) + reply + 3 * (prompt + reply)
            if name != "plain":
                for context in row["auxiliary_prompts"]:
                    total += (prompt if name == "pool" else size(context)) + reply
        counts[name] = total
    return {name: count / counts["plain"] for name, count in counts.items()}
