"""docs/study.md: the study's results, and which differences in them are more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.study_figure import gain_against_drift
from bench.report.study_mixtures import mixtures_section
from bench.report.study_statistics import BASE, Run, by_method, difference, share
from bench.report.study_tables import (
    against_star,
    behaviour_table,
    budget_table,
    by_steps_table,
    diagnostic_table,
    own_drift_table,
    task_table,
)
from bench.report.study_text import (
    MEASURES,
    NAMES,
    STAR,
    TASKS,
    listed,
    method_name,
    percent,
    perplexity,
    signed,
    spread,
)
from bench.report.study_why import why
from bench.studies.study_methods import SEEDED

FIGURE = "study_gain_against_drift.svg"
HOW_TO_READ = (
    "Intervals are of 95%: of one run's score Wilson's, of one run's difference from the base the paired "
    "bootstrap's over items; of three seeds a bootstrap that draws seeds and items (runs of the same seed, which "
    "saw the same rows, in pairs), with the least and the most of the seeds behind it. **Bold** differences leave 0 "
    "out. With one seed they say what other items would give, not what another seed would. Of so many intervals one "
    "in twenty leaves 0 out by chance. KL: of the tuned model from the base on the package's chat probe, nats a "
    "token, after the last step. Seconds of a core and peak memory (resident set) are of the process that trains, "
    "its start and the two measurements of the drift included."
)


def page(parts: Mapping[str, Mapping[str, Any]], where: str, where_mixed: str) -> str:
    """The whole page.

    Args:
        parts: results by part.
        where: command, machine and versions.
        where_mixed: the same of the mixtures, which were run later.
    """
    study, diagnostic, budget = parts["study"], parts["diagnostic"], parts["budget"]
    runs, sizes = study["runs"], study["sizes"]
    sections = [
        "# The study\n\nWritten by `python -m bench report` from `bench/results/study_*_cpu.json`; a test fails where "
        f"this page and they differ. Measured on {study['environment']['cpu']}.",
        summary(runs, sizes),
        "## What was run",
        setting(sizes),
        cost({name: part for name, part in parts.items() if name != "mixtures"}),
        where,
        *(section for task in TASKS for section in (f"## {TASKS[task]}", task_table(runs, task))),
        HOW_TO_READ,
        f"![Gain against drift](figures/{FIGURE})",
        "## UniSD\\* against each other method",
        against_star(runs),
        "## Why",
        why(runs, parts["why"]["runs"][0], sizes),
        "## What else moved",
        behaviour_table(runs),
        own_drift_table(runs),
        "## The diagnostic, by number of steps",
        diagnostic_table(diagnostic),
        by_steps_table(runs),
        "## A budget for the drift",
        budget_table(budget, runs),
        "## Mixtures of teachers",
        mixtures_section(parts.get("mixtures"), runs, where_mixed),
    ]
    return "\n\n".join(sections) + "\n"


def setting(sizes: Mapping[str, Any]) -> str:
    """What every run had."""
    rows = sizes["steps"] * sizes["batch_size"]
    return (
        "SmolLM2-135M-Instruct, weights in bfloat16, LoRA (rank 16, alpha 32, every linear layer) in float32. Every "
        f"method: {sizes['steps']} optimizer steps of {sizes['batch_size']} rows, the same {rows} rows once, learning "
        f"rate {sizes['learning_rate']:g} with 10% warm-up and cosine decay (that of `unisd demo`; searched for no "
        f"method), completions of at most {sizes['completion']} tokens, K = 2, temperature 0.7, presets as they are. "
        "SFT trains on the gold demonstration, all others on their own completions. Procedural tasks have "
        f"{listed(sizes['task_steps'])} steps; rows of CoS-E (version 1.0, three choices) have other rows' answers as "
        f"negatives. Evaluated: {sizes['items']} held-out items of each, greedy, at most {sizes['reply']} tokens for "
        "CoS-E. A run uses one thread; two run side by side. Left out for time: `agreement_sequence` and `match_repr`."
    )


def cost(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """What these parts took."""
    took = [one for part in parts.values() for run in part["runs"] for one in run["cost"].values()]
    seconds, memory = sum(one["core_seconds"] for one in took), max(one["peak_memory_gib"] for one in took)
    return (
        f"All parts but the last together took {seconds:,.0f} seconds of a core, {seconds / 120:.0f} minutes of two "
        f"(the time that the processor gave them, while others used the machine too), and at most {memory:.1f} GiB a "
        "process."
    )


def summary(runs: Sequence[Run], sizes: Mapping[str, Any]) -> str:
    """Five sentences, every figure of which is computed."""
    groups = by_method(runs, "procedural")
    base = percent(share(groups[BASE], "procedural", MEASURES["procedural"][0]))
    procedural, cos_e = (_gains(runs, task, MEASURES[task][0], SEEDED) for task in TASKS)
    others = [name for name in SEEDED if name != STAR]
    star = _gains(runs, "procedural", MEASURES["procedural"][0], others, STAR)
    gains = {name: difference(groups[BASE], groups[name], "procedural", MEASURES["procedural"][0]) for name in SEEDED}
    beyond = listed([method_name(name) for name, gain in gains.items() if gain.leaves_out_zero]) or "none of them"
    before = f"{perplexity(groups[BASE][0]):.2f}"
    shown = (f"{method_name(name)} {spread([perplexity(run) for run in groups[name]], '{:.2f}')}" for name in SEEDED)
    perplexities = ", ".join(shown)
    lenient = _gains(runs, "cos_e", MEASURES["cos_e"][1], SEEDED)
    drifts = f"{_drifts(runs, 'procedural')} on the procedural tasks, and {_drifts(runs, 'cos_e')} on CoS-E"
    sentences = [
        f"On the procedural tasks, of which the base solves {base}, accuracy changes by {procedural} points (means of "
        f"{sizes['seeds']} seeds; 95% intervals over seeds and items, bold where they leave 0 out): beyond chance for "
        f"{beyond}.",
        f"UniSD\\* minus each baseline is {star} there, and the perplexity of the right reply, {before} for the base, "
        f"is {perplexities}.",
        f"On CoS-E the strict score, which wants the form that the prompt asks for, changes by {cos_e}; the lenient "
        f"one, which takes any letter, by {lenient}.",
        f"From the base they moved, on general chat and in nats a token, by {drifts}.",
        f"{sizes['steps']} steps of {sizes['batch_size']} rows on 135M parameters, with one learning rate for all, say "
        "what each method teaches quickly and what that costs, not what it reaches in the end.",
    ]
    return " ".join(sentences)


def _gains(runs: Sequence[Run], task: str, measure: str, names: Sequence[str], of: str | None = None) -> str:
    """Differences from the base by method; or those of the method `of` from each."""
    groups = by_method(runs, task)
    shown = []
    for name in names:
        first, second = (BASE, name) if of is None else (name, of)
        shown.append(f"{method_name(name)} {signed(difference(groups[first], groups[second], task, measure))}")
    return ", ".join(shown)


def _drifts(runs: Sequence[Run], task: str) -> str:
    groups = by_method(runs, task)
    return ", ".join(
        f"{method_name(name)} {statistics.fmean(run['drift_kl'] for run in groups[name]):.3f}" for name in SEEDED
    )


def figure(runs: Sequence[Run]) -> str:
    """Gain against drift, as SVG."""
    panels: dict[str, dict[str, tuple[float, float, float, float]]] = {}
    for task, title in TASKS.items():
        groups = by_method(runs, task)
        panels[f"{title}: {MEASURES[task][0]} minus the base's, percent"] = {
            NAMES.get(name, name): _point(groups[BASE], group, task) for name, group in groups.items() if name != BASE
        }
    return gain_against_drift(panels)


def _point(base: Sequence[Run], group: Sequence[Run], task: str) -> tuple[float, float, float, float]:
    gain = difference(base, group, task, MEASURES[task][0])
    kl = statistics.fmean(run["drift_kl"] for run in group)
    return kl, 100 * gain.value, 100 * gain.low, 100 * gain.high
