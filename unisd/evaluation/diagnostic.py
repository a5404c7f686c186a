"""The procedural diagnostic of a model, by number of steps (see `unisd.data.diagnostic`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unisd.data.diagnostic import DiagnosticTask
from unisd.evaluation.token_limit import token_limit
from unisd.generation import greedy_replies
from unisd.scoring import MEASURES, Interval, mean_interval, wilson
from unisd.scoring.trace import KINDS, Execution, execution
from unisd.turns import as_prompt, readable

_SHARES = ("first_answer", "all_exact")


@dataclass(frozen=True)
class DiagnosticScores:
    """Replies to tasks and what they did.

    Attributes:
        tasks, replies, executions: in the same order.
    """

    tasks: tuple[DiagnosticTask, ...]
    replies: tuple[str, ...]
    executions: tuple[Execution, ...]

    @cached_property
    def by_steps(self) -> dict[int, dict[str, Interval]]:
        """Number of steps -> measure -> mean with its 95% interval:

        - `first_answer`: share of replies whose first answer is right;
        - `exact_steps`, `executed_steps`: mean share of the n steps with the right value, and that are written at all;
        - `all_exact`: share of replies of which every step is right.
        """
        values = list(self._values())
        groups = {
            steps: [each for each, task in zip(values, self.tasks, strict=True) if len(task.steps) == steps]
            for steps in sorted({len(task.steps) for task in self.tasks})
        }
        return {steps: _measures(group) for steps, group in groups.items()}

    @cached_property
    def measures(self) -> dict[str, Interval]:
        """The same of all tasks together."""
        return _measures(list(self._values()))

    @property
    def kinds(self) -> dict[int, dict[str, int]]:
        """Number of steps -> kind of reply (`unisd.scoring.trace.KINDS`) -> count."""
        counts: dict[int, Counter[str]] = {steps: Counter() for steps in self.by_steps}
        for task, found in zip(self.tasks, self.executions, strict=True):
            counts[len(task.steps)][found.kind] += 1
        return {steps: {kind: count[kind] for kind in KINDS} for steps, count in counts.items()}

    def _values(self) -> Iterator[dict[str, float]]:
        """For each task measure -> number in [0, 1]."""
        for task, found in zip(self.tasks, self.executions, strict=True):
            yield {
                "first_answer": float(found.is_right),
                "all_exact": float(found.first_wrong is None),
                "exact_steps": found.exact / len(task.steps),
                "executed_steps": found.executed / len(task.steps),
            }

    def completions(self) -> Iterator[dict[str, Any]]:
        """A row for each task, with its measures and what its reply did."""
        rows = zip(self.tasks, self.replies, self.executions, self._values(), strict=True)
        for number, (task, reply, found, values) in enumerate(rows):
            row: dict[str, Any] = {"number": number, "task_id": task.task_id, "num_steps": len(task.steps), **values}
            row |= {"prompt": task.question, "gold": task.gold_trace, "reply": reply, "kind": found.kind}
            answer = None if found.answer is None else str(found.answer)
            yield {**row, **vars(found), "answer": answer}

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the replies."""
        by_steps = {
            str(steps): {name: interval.as_dict() for name, interval in measures.items()}
            for steps, measures in self.by_steps.items()
        }
        return {
            "benchmark": "diagnostic",
            "kind": "diagnostic",
            "items": len(self.tasks),
            "scores": {name: interval.as_dict() for name, interval in self.measures.items()},
            "by_steps": by_steps,
            "kinds": {str(steps): counts for steps, counts in self.kinds.items()},
        }

    def table(self) -> str:
        """For a terminal: a line for each number of steps, and what the replies are."""
        lines = [f"{'steps':>5} {'tasks':>5} {'first answer':>24} {'exact steps':>12} {'executed':>9}  replies"]
        for steps, measures in self.by_steps.items():
            first = measures["first_answer"]
            share = f"{100 * first.value:.0f}%  [{100 * first.low:.0f}, {100 * first.high:.0f}]"
            kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in self.kinds[steps].items() if count)
            lines.append(
                f"{steps:>5} {first.count:>5} {share:>24} {100 * measures['exact_steps'].value:>11.0f}% "
                f"{100 * measures['executed_steps'].value:>8.0f}%  {kinds}"
            )
        return "\n".join(lines)


def evaluate_diagnostic(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[DiagnosticTask],
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    generate: Callable[[Sequence[Any], int], Sequence[str]] | None = None,
) -> DiagnosticScores:
    """Greedy replies to the tasks, and what they did.

    Args:
        model, tokenizer: what is evaluated.
        tasks: of `diagnostic_tasks`.
        batch_size: prompts generated together.
        max_new_tokens: longest reply; by default twice the longest right one with that number of steps: room for
            words, and to go on after the last step.
        generate: replies to (prompts, most tokens), in place of greedy decoding with `model`.

    Raises:
        ValueError: no tasks.
    """
    if not tasks:
        raise ValueError("there are no tasks to evaluate on")
    replies = [""] * len(tasks)
    groups: dict[int, list[int]] = {}
    for place, task in enumerate(tasks):
        groups.setdefault(len(task.steps), []).append(place)
    for places in groups.values():
        prompts = [readable(tokenizer, as_prompt(tasks[place].question, True)) for place in places]
        limit = max_new_tokens or token_limit(tokenizer, [tasks[place].gold_trace for place in places], 2.0)
        if generate is not None:
            found = generate(prompts, limit)
        else:
            found = greedy_replies(model, tokenizer, prompts, max_new_tokens=limit, batch_size=batch_size)
        for place, reply in zip(places, found, strict=True):
            replies[place] = reply
    executions = tuple(execution(task, reply) for task, reply in zip(tasks, replies, strict=True))
    return DiagnosticScores(tuple(tasks), tuple(replies), executions)


def _measures(values: Sequence[dict[str, float]]) -> dict[str, Interval]:
    """Means: of a share with Wilson's interval, else with the bootstrap's."""
    columns = {name: [each[name] for each in values] for name in MEASURES["diagnostic"]}
    return {
        name: wilson(round(sum(column)), len(column)) if name in _SHARES else mean_interval(column)
        for name, column in columns.items()
    }
