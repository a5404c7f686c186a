"""Why the methods of the study differ, as far as replies and logs show it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.report.study_statistics import BASE, Run, by_method, difference, mean_of, range_over_seeds
from bench.report.study_text import STAR, TASKS, mean_share, method_name, signed
from bench.studies.study_methods import SEEDED
from unisd.presets import PRESETS

_RECIPE_RATE = 2e-5
"""The learning rate of `UniSDConfig`, whose import takes ten seconds."""


def why(runs: Sequence[Run], other: Run, sizes: Mapping[str, Any]) -> str:
    """What the replies and the logs say of the differences.

    Args:
        runs: of the study.
        other: UniSD* with another divergence.
        sizes: of the study.
    """
    groups, cos_e = by_method(runs, "procedural"), by_method(runs, "cos_e")
    named = (BASE, "sft", "gkd", "sdft", STAR)
    worked = ", ".join(f"{method_name(name)} {mean_share(groups[name], 'procedural', 'worked')}" for name in named)
    answered = ", ".join(f"{method_name(name)} {_mean_and_range(groups[name], 'answered')}" for name in named)
    forward = [name for name in groups if name in PRESETS and _is_forward(name)]
    reached = ", ".join(f"{method_name(name)} {mean_share(groups[name], 'procedural', 'accuracy')}" for name in forward)
    same_seed = [run for run in groups[STAR] if run["seed"] == other["seed"]]
    turned = difference(same_seed, [other], "procedural", "accuracy")
    weights = [value for run in groups[STAR] for _, value in run["curves"]["agreement_weight"]]
    least = min(value for run in groups[STAR] for _, value in run["curves"]["agreement_weight_min"])
    live = [name for name in forward if PRESETS[name].teacher == "self" and PRESETS[name].ema == "none"]
    still = [name for name in (*SEEDED, "ema") if name != "sft"]
    turned_reaches = mean_share([other], "procedural", "accuracy")
    form = mean_share(cos_e[BASE], "cos_e", "strict_extracted")
    texts = [
        f"**Steps and form.** Share of the replies in which every step is right, whatever follows: {worked}. Share "
        f"with the line that the prompt asks for, without which no reply counts: {answered}.",
        f"**The direction of the divergence.** Forward KL to the teacher: {reached}. UniSD\\* with SDFT's reverse KL "
        "(`--beta 1`, all else the same; run after the others, to see why; one seed) reaches "
        f"{turned_reaches}, {signed(turned)} points from UniSD\\* of the same seed, with a KL from the base of "
        f"{other['drift_kl']:.3f}.",
        f"**Agreement and moving average.** UniSD\\*'s agreement weights are {statistics.fmean(weights):.4f} in the "
        f"mean and never below {least:.2f}: with the paper's strength they weigh nothing. Its moving average is "
        f"updated every {PRESETS[STAR].sync_steps} steps, once in such a run: until then the teacher is the base.",
        f"**A teacher that does not stand still.** Where it is the student as it is now ({_listing(live)}), replies "
        f"with the answer line fall to {_ends_of(groups, live, 'answered')}% and the KL from the base rises to "
        f"{_kl_of(groups, live)} (procedural tasks), where a moving average or the base keep it at "
        f"{_kl_of(groups, still)}: student and teacher leave together. The learning rate is "
        f"{sizes['learning_rate'] / _RECIPE_RATE:.0f} times the recipe's, which would hardly move a weight in "
        f"{sizes['steps']} steps: these zeros are of this setting, and say nothing of long runs at a small rate.",
        f"**CoS-E.** The base writes the form that the strict score wants in {form} of its replies. A method that "
        "trains on its own completions meets it as rarely there; SFT is shown it in every row.",
    ]
    if groups["plain"][0]["curves"]["loss"] == groups["clip"][0]["curves"]["loss"]:
        texts.append(
            "**A cap that is never reached.** On the procedural tasks `clip`'s run is `plain`'s, step by step."
        )
    return "\n\n".join([*texts, _logs(runs)])


def _mean_and_range(group: Sequence[Run], measure: str) -> str:
    """Over the seeds, on the procedural tasks."""
    text = mean_share(group, "procedural", measure)
    if len(group) == 1:
        return text
    low, high = range_over_seeds(group, "procedural", measure)
    return f"{text} ({100 * low:.0f} to {100 * high:.0f})"


def _is_forward(preset: str) -> bool:
    return PRESETS[preset].method == "unisd" and PRESETS[preset].beta == 0.0


def _listing(names: Sequence[str]) -> str:
    return ", ".join(map(method_name, names))


def _ends_of(groups: Mapping[str, Sequence[Run]], names: Sequence[str], measure: str) -> str:
    """Least and most of the methods' means, in percent."""
    means = [100 * mean_of(groups[name], "procedural", measure) for name in names]
    ends = [f"{end:.0f}" for end in (min(means), max(means))]
    return " to ".join(dict.fromkeys(ends))


def _kl_of(groups: Mapping[str, Sequence[Run]], names: Sequence[str]) -> str:
    means = [statistics.fmean(run["drift_kl"] for run in groups[name]) for name in names]
    return f"{min(means):.3f} to {max(means):.3f}"


def _logs(runs: Sequence[Run]) -> str:
    lines = [
        "| task | method | loss, first and last quarter | mean agreement weight | least | tokens a completion |",
        "|---" * 6 + "|",
    ]
    for task in TASKS:
        for name, group in by_method(runs, task).items():
            if name != BASE:
                lines.append(f"| {TASKS[task]} | {method_name(name)} | {' | '.join(_logged(group))} |")
    return "\n".join(lines)


def _logged(group: Sequence[Run]) -> list[str]:
    curves = [run["curves"] for run in group]
    cells = [_quarters(curves, "loss", "{:.3f}")]
    for name, of in (("agreement_weight", statistics.fmean), ("agreement_weight_min", min)):
        values = [value for curve in curves for _, value in curve.get(name, ())]
        cells.append(f"{of(values):.4f}" if values else "")
    return [*cells, _quarters(curves, "length", "{:.0f}")]


def _quarters(curves: Sequence[Mapping[str, Any]], name: str, shown: str) -> str:
    """Means of the first and last quarter of the steps, over the runs."""
    columns = [[value for _, value in curve.get(name, ())] for curve in curves]
    if not all(columns):
        return ""
    quarter = max(1, min(map(len, columns)) // 4)
    ends = (statistics.fmean(v for c in columns for v in part(c)) for part in _ends(quarter))
    return " -> ".join(shown.format(end) for end in ends)


def _ends(quarter: int) -> tuple[Callable[[list[float]], list[float]], ...]:
    return (lambda column: column[:quarter]), (lambda column: column[-quarter:])
