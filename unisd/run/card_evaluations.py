"""Evaluations in a run's model card: the scores, and beside them behaviour, drift and retention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unisd.compare.runs import Run, load_run
from unisd.evaluation.behaviour import LIMITS
from unisd.run.model_card import EVALUATIONS_BEGIN, EVALUATIONS_END, table
from unisd.scoring.behaviour import KINDS


def update_card(folder: Path) -> bool:
    """Write what is in `eval/` of a run into its README.md; whether it has one with a place for that."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, begin, rest = text.partition(EVALUATIONS_BEGIN)
    _, end, after = rest.partition(EVALUATIONS_END)
    if not begin or not end:
        return False
    run = load_run(folder, with_rows=False)  # after each of many evaluations
    card.write_text("\n".join([before + begin, *_lines(run), end + after]), encoding="utf-8")
    return True


def _lines(run: Run) -> list[str]:
    rows = [
        (name, result.measure.replace("_", " "), _share(result.score), str(result.score["count"]))
        for name, result in run.benchmarks.items()
        if result.score is not None
    ]
    if run.behaviour is not None:
        by_kind = run.behaviour["by_kind"]
        rows += [("behaviour", KINDS[kind], _share(share), str(share["count"])) for kind, share in by_kind.items()]
    lines = table(("evaluation", "measure", "share, 95% interval", "items"), rows) if rows else []
    if run.behaviour is not None:
        lines += ["", f"The behaviour probe is {LIMITS}."]
    moved = _moved(run)
    return lines + (["", *table(("drift from the base model", "value"), moved)] if moved else [])


def _moved(run: Run) -> list[tuple[str, str]]:
    rows = []
    if run.drift is not None:
        for name, whose in (("forward", "of_tuned"), ("reverse", "of_base")):
            rows.append((f"{name} perplexity, own completions", f"{run.drift[whose]['perplexity']['value']:.4g}"))
        rows.append(("JSD, nats a token", f"{run.drift['jsd']['value']:.4g}"))
    if run.retention is not None:
        rows.append(("retention: KL on fixed chat, nats a token", f"{run.retention['kl']:.4g}"))
        before, after = (run.retention[f"{whose}_perplexity"] for whose in ("base", "trained"))
        rows.append(("perplexity of those answers", f"{before:.4g} -> {after:.4g}"))
    return rows


def _share(interval: Any) -> str:
    return f"{100 * interval['value']:.1f}% [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"
