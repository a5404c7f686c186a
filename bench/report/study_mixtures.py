"""Mixtures of teachers in docs/study.md: beside the same method without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.study_statistics import Run, by_method, difference
from bench.report.study_text import (
    MEASURES,
    TASKS,
    listed,
    mean_share,
    method_name,
    perplexity,
    shown_share,
    signed,
    spread,
)
from bench.studies.study_methods import MIXED, PLAIN, STEADY


def mixtures_section(result: Mapping[str, Any] | None, runs: Sequence[Run], where: str) -> str:
    """Text and table.

    Args:
        result: the part's results; None where it was not run.
        runs: of the study.
        where: command, machine and versions of the part.
    """
    if not result:
        return "Not run yet: `python -m bench study --part mixtures`."
    mixed = [run for run in result["runs"] if run["variant"] or run["preset"] != PLAIN]
    texts = [_introduction(result), _control(result["runs"], runs), _table(mixed, result["runs"], runs)]
    return "\n\n".join([*(text for text in texts if text), _cost(result["runs"]), where])


def _introduction(result: Mapping[str, Any]) -> str:
    sizes = result["sizes"]
    return (
        "[A teacher that is a mixture of views](mixtures.md), run later than the rest: same machine, rows, steps "
        f"({sizes['steps']} of {sizes['batch_size']} rows) and settings, other code (its commit is below). Alone with "
        f"one seed, as each mechanism of the study, and with {method_name(STEADY)}'s divergence and average (`--preset "
        f"{STEADY} --teacher_mixture ...`), whose teacher does not run away with the student. K = 2, alpha 0.5."
    )


def _control(mine: Sequence[Run], runs: Sequence[Run]) -> str:
    """Whether the study's plain run comes out again."""
    again = [run for run in mine if run["preset"] == PLAIN and not run["variant"]]
    if not again:
        return "The study's `plain` was not repeated, so that code and day stand between these runs and the study's."
    (before,) = by_method(runs, "procedural")[PLAIN]
    same_loss = again[0]["curves"]["loss"] == before["curves"]["loss"]
    digits = [run["evaluations"]["procedural"]["digits"] for run in (again[0], before)]
    if same_loss and digits[0] == digits[1]:
        found = "loss for loss and item for item the same: the runs can be compared"
    else:
        loss = "the same losses" if same_loss else "other losses"
        moved = signed(difference([before], again, "procedural", "accuracy"))
        found = f"with {loss}, {moved} points of accuracy and a KL of {again[0]['drift_kl']:.3f} for the study's "
        found += f"{before['drift_kl']:.3f}: differences of that size are those of the machine"
    return f"The study's `plain` was run once more beside them and came out {found}."


def _table(mixed: Sequence[Run], mine: Sequence[Run], runs: Sequence[Run]) -> str:
    titles = ["task", "method", "seeds", "right", "minus the same without", "in form or lenient", "perplexity", "KL"]
    lines = [f"| {' | '.join([*titles, 'core-seconds'])} |", "|---" * (1 + len(titles)) + "|"]
    for task, title in TASKS.items():
        measure, second = MEASURES[task]
        for key in dict.fromkeys((run["variant"], run["preset"]) for run in mixed if run["data"] == task):
            group = [run for run in mixed if (run["variant"], run["preset"]) == key and run["data"] == task]
            without = _without(key[1] if key[0] else PLAIN, task, group, mine, runs)
            name = f"{method_name(key[1])} with `{key[0].removeprefix(key[1] + '_')}`" if key[0] else f"`{key[1]}`"
            cells = [title, name, str(len(group)), shown_share(group, task, measure)]
            cells += [signed(difference(without, group, task, measure)), mean_share(group, task, second)]
            cells.append(spread([perplexity(run) for run in group], "{:.3f}") if task == "procedural" else "")
            cells += [
                f"{spread([run['drift_kl'] for run in group], '{:.3f}')} (without {_mean_kl(without)})",
                spread([run["cost"]["train"]["core_seconds"] for run in group], "{:.0f}"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _without(preset: str, task: str, group: Sequence[Run], mine: Sequence[Run], runs: Sequence[Run]) -> list[Run]:
    """The method without a mixture, of the same seeds: run beside the mixtures where it was, else the study's."""
    seeds = [run["seed"] for run in group]
    beside = [run for run in mine if (run["preset"], run["variant"], run["data"]) == (preset, "", task)]
    return [run for run in beside or by_method(runs, task)[preset] if run["seed"] in seeds]


def _mean_kl(group: Sequence[Run]) -> str:
    return f"{sum(run['drift_kl'] for run in group) / len(group):.3f}"


def _cost(mine: Sequence[Run]) -> str:
    seconds = sum(one["core_seconds"] for run in mine for one in run["cost"].values())
    missing = _missing(mine)
    return (
        f"{seconds:,.0f} seconds of a core for {len(mine)} runs, on a machine that others used too. "
        + (f"Not run for time: {missing}. " if missing else "")
        + "With one seed an interval says what other items would give, not what another seed would."
    )


def _missing(mine: Sequence[Run]) -> str:
    """Seeds and tasks that were planned and are not there."""
    there = {(run["data"], run["preset"], run["variant"], run["seed"]) for run in mine}
    seeds = [
        f"seed {seed} of {method_name(STEADY)} with `{mixture}`"
        for seed in range(3)
        for mixture in MIXED.values()
        if ("procedural", STEADY, f"{STEADY}_{mixture}", seed) not in there
    ]
    alone = [f"`{name}` on {TASKS[t]}" for t in TASKS for name in MIXED if (t, name, "", 0) not in there]
    return listed([*alone, *seeds])
