"""Accuracy and perplexity on procedural tasks, by number of steps (see `unisd.data.procedural`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unisd.data.procedural import parse_answer
from unisd.evaluation.perplexity import CompletionScores, completion_scores
from unisd.evaluation.token_limit import token_limit
from unisd.generation import greedy_replies
from unisd.scoring import Interval, wilson
from unisd.turns import Prompt, readable

Generate = Callable[[Sequence[Prompt]], Sequence[str]]


@dataclass(frozen=True)
class StepScores:
    """Scores of the tasks with one number of steps, or of all.

    Attributes:
        num_steps: None for all tasks together.
        count: number of tasks.
        accuracy: share of tasks whose final answer is right, in 0..1; None if replies were not asked for.
        answered: share of replies that have an `Answer:` line at all; None likewise.
        perplexity: of the correct reply, per token; None if not asked for.
    """

    num_steps: int | None
    count: int
    accuracy: float | None
    answered: float | None
    perplexity: float | None

    @property
    def measures(self) -> dict[str, Interval]:
        """`accuracy` and `answered` with Wilson's 95% interval; {} if replies were not asked for."""
        shares = {"accuracy": self.accuracy, "answered": self.answered}
        return {
            name: wilson(round(share * self.count), self.count) for name, share in shares.items() if share is not None
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "scores": {name: interval.as_dict() for name, interval in self.measures.items()}}


@dataclass(frozen=True)
class ProceduralScores:
    """Scores of a model.

    Attributes:
        by_steps: by number of steps, ascending.
        overall: of all tasks.
        replies: in the order of the rows; () if they were not asked for.
        tasks: the rows that they reply to: `prompt` (as it was asked), `completion`, `answer`, `num_steps`.
        gold_nll: of each correct reply, mean over its tokens of minus the log-probability, nats; () if not asked for.
    """

    by_steps: tuple[StepScores, ...]
    overall: StepScores
    replies: tuple[str, ...]
    tasks: tuple[Mapping[str, Any], ...] = ()
    gold_nll: tuple[float, ...] = ()

    def completions(self) -> Iterator[dict[str, Any]]:
        """A row for each task, with the measures that were asked for."""
        for number, task in enumerate(self.tasks):
            row: dict[str, Any] = {"number": number, "num_steps": int(task["num_steps"])}
            if self.gold_nll:
                row["gold_nll"] = self.gold_nll[number]
            if self.replies:
                answer = parse_answer(self.replies[number])
                row |= {"accuracy": float(answer == task["answer"]), "answered": float(answer is not None)}
            row |= {"prompt": task["prompt"], "gold": task["completion"]}
            yield {**row, "reply": self.replies[number]} if self.replies else row

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the replies: what a benchmark's result has, and the scores by number of steps."""
        overall = self.overall.as_dict()
        return {
            "benchmark": "procedural",
            "kind": "procedural",
            "items": self.overall.count,
            "scores": overall["scores"],
            "by_steps": [scores.as_dict() for scores in self.by_steps],
            "overall": overall,
        }

    def table(self) -> str:
        """A plain-text table, one line for each number of steps and one for all."""
        lines = [f"{'steps':>5} {'tasks':>6} {'accuracy':>9} {'answered':>9} {'perplexity':>11}"]
        for scores in (*self.by_steps, self.overall):
            steps = "all" if scores.num_steps is None else str(scores.num_steps)
            perplexity = "-" if scores.perplexity is None else f"{scores.perplexity:.3f}"
            lines.append(
                f"{steps:>5} {scores.count:>6} {_percent(scores.accuracy):>9} {_percent(scores.answered):>9} "
                f"{perplexity:>11}"
            )
        return "\n".join(lines)


def evaluate_procedural(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    prompt_column: str = "prompt",
    accuracy: bool = True,
    perplexity: bool = True,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    generate: Generate | None = None,
    impl: str | None = None,
) -> ProceduralScores:
    """Accuracy of greedy replies, and perplexity of the correct replies, by number of steps.

    Args:
        model, tokenizer: what is evaluated (a PEFT model with its adapter).
        rows: of `procedural_rows` or `procedural_dataset`.
        prompt_column: "prompt" for the student's view; "teacher_prompt" or "negative_prompt" to see what a context is
            worth.
        accuracy: whether to generate replies.
        perplexity: whether to score the correct replies.
        batch_size: for both.
        max_new_tokens: longest reply; by default half as long again as the longest correct reply with that number of
            steps, plus 8.
        generate: replies to a list of prompts, in place of the built-in greedy decoding with `model` (an inference
            server, say).
        impl: of `unisd_kernels.linear_logprobs`.

    Raises:
        ValueError: no rows, or a row without a column that is needed.
    """
    tasks = list(rows)
    _check_columns(tasks, prompt_column)
    asked = [readable(tokenizer, task[prompt_column]) for task in tasks]
    groups: dict[int, list[int]] = {}
    for place, task in enumerate(tasks):
        groups.setdefault(int(task["num_steps"]), []).append(place)

    replies = [""] * len(tasks)
    if accuracy:
        # Group by group, since the number of tokens that a reply needs grows with the number of steps.
        for places in groups.values():
            prompts = [asked[place] for place in places]
            limit = max_new_tokens
            if limit is None and generate is None:
                limit = token_limit(tokenizer, [tasks[place]["completion"] for place in places])
            found = (
                generate(prompts)
                if generate is not None
                else greedy_replies(model, tokenizer, prompts, max_new_tokens=limit or 1, batch_size=batch_size)
            )
            for place, reply in zip(places, found, strict=True):
                replies[place] = reply
    likelihood = None
    if perplexity:
        likelihood = completion_scores(
            model,
            tokenizer,
            asked,
            [task["completion"] for task in tasks],
            batch_size=batch_size,
            impl=impl,
        )

    def scores(num_steps: int | None, places: Sequence[int]) -> StepScores:
        return _step_scores(num_steps, places, tasks, replies if accuracy else None, likelihood)

    return ProceduralScores(
        by_steps=tuple(scores(steps, groups[steps]) for steps in sorted(groups)),
        overall=scores(None, range(len(tasks))),
        replies=tuple(replies) if accuracy else (),
        tasks=tuple(
            {"prompt": prompt, **{name: task[name] for name in ("completion", "answer", "num_steps")}}
            for prompt, task in zip(asked, tasks, strict=True)
        ),
        gold_nll=()
        if likelihood is None
        else tuple(nll / count for nll, count in zip(likelihood.nll, likelihood.num_tokens, strict=True)),
    )


def _step_scores(
    num_steps: int | None,
    places: Sequence[int],
    tasks: Sequence[Mapping[str, Any]],
    replies: Sequence[str] | None,
    likelihood: CompletionScores | None,
) -> StepScores:
    right = answered = None
    if replies is not None:
        answers = [parse_answer(replies[place]) for place in places]
        answered = sum(answer is not None for answer in answers) / len(places)
        expected = [tasks[place]["answer"] for place in places]
        right = sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True)) / len(places)
    perplexity = None if likelihood is None else likelihood.select(places).perplexity
    return StepScores(num_steps, len(places), right, answered, perplexity)


def _check_columns(tasks: Sequence[Mapping[str, Any]], prompt_column: str) -> None:
    if not tasks:
        raise ValueError("rows is empty: there is nothing to evaluate.")
    for place, task in enumerate(tasks):
        missing = [name for name in (prompt_column, "completion", "answer", "num_steps") if name not in task]
        if missing:
            raise ValueError(f"row {place} lacks the column(s) {missing}; it has {sorted(task)}.")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
