"""Completions side by side: what the runs reply to the same question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unisd.compare.runs import Run


def completions_side_by_side(runs: Sequence[Run], most: int = 6) -> dict[str, list[dict[str, Any]]]:
    """Benchmark -> items on which the runs disagree first, then others: prompt, gold and each run's reply with its
    score. What less than two runs were asked, and a secret benchmark, is left out."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.benchmarks):
        with_it = [
            run for run in runs if name in run.benchmarks and run.benchmarks[name].rows and run.benchmarks[name].score
        ]
        results = [run.benchmarks[name] for run in with_it]
        if len(with_it) < 2 or not all("prompt" in row for result in results for row in result.rows.values()):
            continue
        shared = sorted(set.intersection(*(set(result.rows) for result in results)))
        asked = [{str(result.rows[n]["prompt"]) for result in results} for n in shared]
        numbers = [n for n, prompts in zip(shared, asked, strict=True) if len(prompts) == 1]
        measure = results[0].measure
        disagree = [n for n in numbers if len({result.rows[n][measure] for result in results}) > 1]
        agree = [n for n in numbers if n not in set(disagree)]
        items = []
        for number in [*disagree, *agree][:most]:
            rows = [result.rows[number] for result in results]
            replies = [
                {"run": run.name, "reply": row["reply"], "score": row[measure]}
                for run, row in zip(with_it, rows, strict=True)
            ]
            prompt = rows[0]["prompt"]
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            items.append({"number": number, "prompt": text, "gold": rows[0]["gold"], "replies": replies})
        if items:
            out[name] = items
    return out
