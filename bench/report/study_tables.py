"""Tables of docs/study.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.study_statistics import BASE, Run, by_method, difference
from bench.report.study_text import (
    IN_TEXT,
    MEASURES,
    STAR,
    TASKS,
    interval_of,
    listed,
    method_name,
    percent,
    perplexity,
    shown_share,
    signed,
    spread,
)
from bench.studies.study_methods import SEEDED
from unisd.scoring.behaviour import KINDS

_DIAGNOSTIC = ("first_answer", "exact_steps", "executed_steps")


def task_table(runs: Sequence[Run], task: str) -> str:
    """A line for each method."""
    first, second = MEASURES[task]
    groups = by_method(runs, task)
    titles = ["method", "seeds", first, "minus base", second, "KL", "core-seconds", "GiB"]
    if task == "procedural":
        titles.insert(5, "perplexity of the right reply")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, group in groups.items():
        tuned = name != BASE
        cells = [method_name(name), str(len(group)) if tuned else "", shown_share(group, task, first)]
        cells += [
            signed(difference(groups[BASE], group, task, first)) if tuned else "",
            shown_share(group, task, second),
        ]
        if task == "procedural":
            cells.append(spread([perplexity(run) for run in group], "{:.3f}"))
        cells.append(spread([run["drift_kl"] for run in group], "{:.3f}") if tuned else "")
        for cost, shown in (("core_seconds", "{:.0f}"), ("peak_memory_gib", "{:.1f}")):
            cells.append(spread([run["cost"]["train"][cost] for run in group], shown) if tuned else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_star(runs: Sequence[Run]) -> str:
    """UniSD* minus each other method."""
    head = "| UniSD\\* minus | " + " | ".join(f"{TASKS[task]}, {MEASURES[task][0]}" for task in TASKS) + " |"
    lines = [head, "|---" * (1 + len(TASKS)) + "|"]
    groups = {task: by_method(runs, task) for task in TASKS}
    for name in groups["procedural"]:
        if name != STAR:
            cells = [
                signed(difference(group[name], group[STAR], task, MEASURES[task][0])) for task, group in groups.items()
            ]
            lines.append(f"| {method_name(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def behaviour_table(runs: Sequence[Run]) -> str:
    """Shares of the behaviour probe that are as they should be."""
    probed = [run for run in runs if run["behaviour"]]
    kinds = list(probed[0]["behaviour"])
    lines = [f"| trained | {' | '.join(KINDS[kind] for kind in kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for run in probed:
        trained = "base" if run["preset"] == BASE else f"{method_name(run['preset'])} on {IN_TEXT[run['data']]}"
        lines.append(f"| {trained} | {' | '.join(percent(interval_of(run['behaviour'][kind])) for kind in kinds)} |")
    text = "The behaviour probe (`unisd eval behaviour`), share as it should be, first seed:"
    return "\n\n".join([text, "\n".join(lines)])


def own_drift_table(runs: Sequence[Run]) -> str:
    """`unisd eval drift`."""
    lines = ["| trained | perplexity of its chat under the base | of the base's under it | JSD |", "|---" * 4 + "|"]
    for run in runs:
        if run["own_drift"]:
            own = run["own_drift"]
            shown = [own["of_tuned"]["perplexity"], own["of_base"]["perplexity"], own["jsd"]]
            cells = [f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in shown]
            lines.append(f"| {method_name(run['preset'])} on {IN_TEXT[run['data']]} | {' | '.join(cells)} |")
    text = "Drift on greedy completions of general chat (`unisd eval drift`), first seed; JSD in nats a token:"
    return "\n\n".join([text, "\n".join(lines)])


def diagnostic_table(result: Mapping[str, Any]) -> str:
    """First answers, steps and kinds of replies, by number of steps."""
    sizes = result["sizes"]
    lines = ["| steps | method | first answer | exact steps | executed | replies |", "|---" * 6 + "|"]
    for steps in result["runs"][0]["evaluations"]["diagnostic"]["by_steps"]:
        for run in result["runs"]:
            found = run["evaluations"]["diagnostic"]
            measures = {name: interval_of(value) for name, value in found["by_steps"][steps].items()}
            kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in found["kinds"][steps].items() if n)
            cells = [steps, method_name(run["preset"]), *(percent(measures[m]) for m in _DIAGNOSTIC), kinds]
            lines.append(f"| {' | '.join(cells)} |")
    floor = max(
        run["evaluations"]["diagnostic"]["by_steps"][steps]["first_answer"]["value"]
        for run in result["runs"]
        for steps in run["evaluations"]["diagnostic"]["by_steps"]
    )
    digits = [run["evaluations"]["diagnostic"]["digits"] for run in result["runs"]]
    right = [exact for each in digits for first, exact in zip(each["first_answer"], each["all_exact"]) if first == "1"]
    text = (
        f"Trained on the diagnostic's rows of {listed(sizes['diagnostic_steps'])} steps with all four operations "
        f"(completions of at most {sizes['diagnostic_completion']} tokens, else as above, one seed), asked for sums "
        f"and differences of {listed(sizes['asked_steps'])} steps, {sizes['asked']} held-out tasks in all. No "
        f"first-answer accuracy is above {100 * floor:.0f}%: arithmetic with decimals is out of the reach of 135M "
        "parameters in so few steps of training, so that the diagnostic tells kinds of replies apart here, and not "
        f"whether step-tracking is repaired. Of the {len(right)} right first answers {right.count('0')} come without "
        "all steps right: there the answer is an input (S1 + S2 - S2), which the reply repeats; since these runs no "
        "such task is drawn."
    )
    return "\n\n".join([text, "\n".join(lines)])


def by_steps_table(runs: Sequence[Run]) -> str:
    """Accuracy on the procedural tasks by their number of steps, means over seeds."""
    groups = by_method(runs, "procedural")
    numbers = [each["num_steps"] for each in groups[BASE][0]["evaluations"]["procedural"]["by_steps"]]
    titles = ["method", *(f"accuracy at {n} {'step' if n == 1 else 'steps'}" for n in numbers)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in (BASE, *SEEDED):
        shares = [
            [100 * each["accuracy"] for each in run["evaluations"]["procedural"]["by_steps"]] for run in groups[name]
        ]
        cells = (spread(column, "{:.0f}%") for column in zip(*shares, strict=True))
        lines.append(f"| {method_name(name)} | {' | '.join(cells)} |")
    text = (
        "The procedural tasks of above, whole numbers in the same form, are in reach; by number of steps (means over "
        "seeds, their least and most):"
    )
    return "\n\n".join([text, "\n".join(lines)])


def budget_table(result: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """KL step by step and accuracy, with and without a budget; below them the study's runs of the same method."""
    sizes = result["sizes"]
    budget, preset = sizes["budget"], result["runs"][0]["preset"]
    study = by_method(runs, "procedural")[preset]
    kept = [run for run in result["runs"] if run["variant"] == "kept"]
    free = [run for run in result["runs"] if run["variant"] == "free"]
    titles = ["run", "seed", "steps", "KL (after step)", "last KL / budget", "accuracy", "answered", "perplexity"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for what, group in (("without", free), ("with", kept), ("the study's", study)):
        for run in group:
            curve = ", ".join(f"{value:.3f} ({step})" for step, value in run["curves"]["drift"] if step)
            scores = {name: interval_of(value) for name, value in run["evaluations"]["procedural"]["scores"].items()}
            cells = [what, str(run["seed"]), str(run["steps"]), curve, f"{run['drift_kl'] / budget:.2f}"]
            cells += [percent(scores["accuracy"]), percent(scores["answered"]), f"{perplexity(run):.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    against = (signed(difference(others, kept, "procedural", "accuracy")) for others in (study, free))
    text = (
        f"{method_name(preset)} on the procedural tasks at a learning rate of {sizes['budget_rate']:g}, held constant "
        f"without warm-up, for {sizes['budget_steps']} steps; `--drift_budget {budget:g} --drift_probe_every 4`. With "
        f"the budget minus the study's ({sizes['learning_rate']:g}, {sizes['steps']} steps), accuracy, means over "
        f"seeds: {next(against)} points; minus without: {next(against)}."
    )
    return "\n\n".join([text, "\n".join(lines)])
