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
        return (
            "Not run yet: `python -m bench study --part mixtures`, with `--dtype float32` where the processor has no "
            "products of 16 bits, and bfloat16 takes longer."
        )
    mine = result["runs"]
    texts = [_introduction(result), _finding(mine), _control(mine, runs), _table(mine)]
    return "\n\n".join([*(text for text in texts if text), _cost(mine), where])


def _introduction(result: Mapping[str, Any]) -> str:
    sizes = result["sizes"]
    dtype = sizes.get("dtype", "bfloat16")
    weights = (
        "" if dtype == "bfloat16" else f", but with weights in {dtype}, since the processor has no products of 16 bits"
    )
    return (
        "[A teacher that is a mixture of views](mixtures.md), run later than the rest, on the machine and with the "
        f"code of the last line here; rows, steps ({sizes['steps']} of {sizes['batch_size']} rows), seeds and settings "
        f"of the study{weights}. Each is compared with the same method without a mixture, run beside it: with "
        f"{method_name(STEADY)}, whose teacher does not run away with the student (`--preset {STEADY} "
        "--teacher_mixture ...`), and alone with one seed, as each mechanism of the study. K = 2, alpha 0.5."
    )


def _finding(mine: Sequence[Run]) -> str:
    """In a sentence: what the mixtures changed of the baseline that has every seed."""
    shown, beyond, counts = [], [], set()
    for mixture in MIXED.values():
        group, without = _pair((f"{STEADY}_{mixture}", STEADY), "procedural", mine)
        if group:
            moved = difference(without, group, "procedural", MEASURES["procedural"][0])
            shown.append(f"`{mixture}` {signed(moved)}")
            beyond += [f"`{mixture}`"] if moved.leaves_out_zero else []
            counts.add(len(group))
    if not shown:
        return ""
    seeds = " or ".join(f"{count} seed{'s' if count > 1 else ''}" for count in sorted(counts))
    return (
        f"On the procedural tasks a mixture changes the accuracy of {method_name(STEADY)} by {', '.join(shown)} points "
        f"({seeds}; 95% intervals over seeds and items): beyond chance for {listed(beyond) or 'none of them'}."
    )


def _control(mine: Sequence[Run], runs: Sequence[Run]) -> str:
    """Whether the study's plain run comes out again."""
    again = [run for run in mine if (run["preset"], run["variant"], run["data"]) == (PLAIN, "", "procedural")]
    if not again:
        return "The study's `plain` was not repeated, so that code and day stand between these runs and the study's."
    (before,) = by_method(runs, "procedural")[PLAIN]
    same_loss = again[0]["curves"]["loss"] == before["curves"]["loss"]
    digits = [run["evaluations"]["procedural"]["digits"] for run in (again[0], before)]
    if same_loss and digits[0] == digits[1]:
        found = "loss for loss and item for item the same: these runs can be compared with the study's"
    else:
        loss = "the same losses" if same_loss else "other losses"
        moved = signed(difference([before], again, "procedural", "accuracy"))
        found = f"with {loss}, {moved} points of accuracy and a KL of {again[0]['drift_kl']:.3f} for the study's "
        found += f"{before['drift_kl']:.3f}: differences of that size are those of the machine"
    return f"The study's `plain` was run once more beside them and came out {found}."


def _table(mine: Sequence[Run]) -> str:
    titles = ["task", "method", "seeds", "right", "minus the same without", "in form or lenient", "perplexity", "KL"]
    lines = [f"| {' | '.join([*titles, 'core-seconds'])} |", "|---" * (1 + len(titles)) + "|"]
    for task, title in TASKS.items():
        measure, second = MEASURES[task]
        for key in dict.fromkeys((run["variant"], run["preset"]) for run in mine if run["data"] == task):
            group, without = _pair(key, task, mine)
            if not group:
                continue
            name = (
                f"{method_name(key[1])} with `{key[0].removeprefix(key[1] + '_')}`" if key[0] else method_name(key[1])
            )
            drift = spread([run["drift_kl"] for run in group], "{:.3f}")
            cells = [title, name, str(len(group)), shown_share(group, task, measure)]
            cells.append("" if without is group else signed(difference(without, group, task, measure)))
            cells.append(mean_share(group, task, second))
            cells.append(spread([perplexity(run) for run in group], "{:.3f}") if task == "procedural" else "")
            cells.append(drift if without is group else f"{drift} (without {_mean_kl(without)})")
            cells.append(spread([run["cost"]["train"]["core_seconds"] for run in group], "{:.0f}"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(key: tuple[str, str], task: str, mine: Sequence[Run]) -> tuple[Sequence[Run], Sequence[Run]]:
    """Runs of a method (variant, preset), and of the same without a mixture and of the same seeds; itself where it is
    without one."""

    def runs_of(variant: str, preset: str) -> list[Run]:
        return [run for run in mine if (run["variant"], run["preset"], run["data"]) == (variant, preset, task)]

    variant, preset = key
    group = runs_of(variant, preset)
    if not variant and preset not in MIXED:
        return group, group
    without = runs_of("", preset if variant else PLAIN)
    seeds = {run["seed"] for run in group} & {run["seed"] for run in without}
    first, second = ([run for run in each if run["seed"] in seeds] for each in (group, without))
    return first, second


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
