"""A model on a benchmark: greedy replies, their scores with intervals, and every completion to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unisd.benchmarks.base import Benchmark
from unisd.evaluation.perplexity import completion_scores
from unisd.generation import Generator, Request, Sampling
from unisd.prepare.replies import ReplyStore
from unisd.scoring import MEASURES, Interval, Scored, mean_interval, score_replies, wilson
from unisd.tasks import Example, read_rows
from unisd.tasks.multiple_choice import LETTERS
from unisd.turns import Prompt, as_prompt

_LABELS = {"strict": "right (strict)", "lenient": "right (lenient)", "likelihood": "right (likelihood)"}


@dataclass(frozen=True)
class Item:
    """One question and what became of it.

    Attributes:
        number: of the row.
        group: see `Benchmark.group`.
        example: the question.
        reply: of the model.
        scored: what it is worth.
    """

    number: int
    group: str
    example: Example
    reply: str
    scored: Scored


@dataclass(frozen=True)
class BenchmarkScores:
    """Scores of a model on a benchmark.

    Attributes:
        benchmark: which.
        items: in the order of the rows.
        dropped: reasons with counts, of rows that could not be read.
    """

    benchmark: Benchmark
    items: tuple[Item, ...]
    dropped: Mapping[str, int]

    @cached_property
    def measures(self) -> dict[str, Interval]:
        """Mean of each measure with its 95% interval: Wilson's for shares, else the bootstrap's."""
        return _measures(self.items)

    @cached_property
    def groups(self) -> dict[str, dict[str, Interval]]:
        """The same by group, in the order of their names; {} where there is one group or none."""
        names = sorted({item.group for item in self.items if item.group})
        if len(names) < 2:
            return {}
        return {name: _measures([item for item in self.items if item.group == name]) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without texts."""
        return {
            "benchmark": self.benchmark.name,
            "kind": self.benchmark.kind,
            "items": len(self.items),
            "dropped": dict(self.dropped),
            "scores": {name: interval.as_dict() for name, interval in self.measures.items()},
            "groups": {
                group: {name: interval.as_dict() for name, interval in measures.items()}
                for group, measures in self.groups.items()
            },
        }

    def completions(self) -> Iterator[dict[str, Any]]:
        """A row for each item; of a secret benchmark without its texts."""
        for item in self.items:
            row: dict[str, Any] = {"number": item.number, "group": item.group, **item.scored.values}
            if not self.benchmark.secret:
                gold = item.example.answer
                row |= {"prompt": item.example.prompt, "gold": gold, "reply": item.reply, "found": item.scored.found}
            yield row

    def table(self) -> str:
        """For a terminal."""
        lines = [f"{self.benchmark.name}: {len(self.items)} items"]
        lines += [f"  {count} dropped: {reason}" for reason, count in self.dropped.items()]
        for name, interval in self.measures.items():
            lines.append(f"  {_LABELS.get(name, name.replace('_', ' ')):<20} {interval.percent()}")
        first = MEASURES[self.benchmark.kind][0]
        lines += [
            f"    {group:<18} {measures[first].percent()}  of {measures[first].count}"
            for group, measures in self.groups.items()
        ]
        return "\n".join(lines)


def evaluate_benchmark(
    benchmark: Benchmark,
    rows: Sequence[Mapping[str, Any]],
    generator: Generator,
    *,
    chats: bool = True,
    max_new_tokens: int = 1024,
    seed: int = 42,
    unsafe_code: bool = False,
    scored_by: tuple[Any, Any] | None = None,
    store: Path | None = None,
    progress: bool = False,
) -> BenchmarkScores:
    """Scores of greedy replies.

    Replies are kept in the user's cache as they are written, so a run that was killed goes on where it was; those of a
    secret benchmark are not.

    Args:
        benchmark: which.
        rows: of `benchmark.rows`.
        generator: writes the replies.
        chats: whether it reads messages (it has a chat template) or plain text.
        max_new_tokens: longest reply.
        seed: of the order of choices, which is drawn by `Random(seed + number of the row)`.
        unsafe_code: run code without bubblewrap, see `unisd.sandbox.Sandbox`.
        scored_by: `(model, tokenizer)` for the likelihood of the options as a second, separate measure (multiple
            choice only): the option X whose "Answer: X" is the most probable reply, by `unisd_kernels` without logits.
        store: file of the replies; None for that of the user's cache.
        progress: whether to show bars.

    Raises:
        ValueError: no row can be read, no sandbox for code, likelihoods of something else than choices.
    """
    if scored_by is not None and benchmark.kind != "choice":
        raise ValueError(f"likelihoods are of multiple choice, and {benchmark.name} is {benchmark.kind}")
    reading = read_rows(rows, kind=benchmark.kind, seed=seed, unsafe_code=unsafe_code)
    if not reading.examples:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in reading.rejected.most_common(5))
        raise ValueError(f"none of the {len(rows)} rows of {benchmark.name} can be read: {reasons}")
    examples = reading.examples
    prompts = [as_prompt(each.prompt, chats) if isinstance(each.prompt, str) else each.prompt for each in examples]
    replies = ReplyStore(generator, Path(":memory:") if benchmark.secret else store).replies(
        [Request(prompt) for prompt in prompts],
        Sampling(temperature=0.0, max_new_tokens=max_new_tokens),
        benchmark.name if progress else None,
    )
    scored = score_replies(benchmark.kind, examples, replies, unsafe_code=unsafe_code, progress=progress)
    if scored_by is not None:
        right = _most_likely(*scored_by, examples, prompts, generator.batch_size)
        scored = [Scored({**each.values, "likelihood": r}, each.found) for each, r in zip(scored, right, strict=True)]
    # ToolAlpaca's rows become several examples each, whose numbers are not those of the rows.
    grouped = benchmark.group and benchmark.kind != "tools"
    items = [
        Item(number, str(rows[number].get(benchmark.group, "")) if grouped else "", example, reply, each)
        for number, example, reply, each in zip(reading.numbers, examples, replies, scored, strict=True)
    ]
    return BenchmarkScores(benchmark, tuple(items), Counter(reading.rejected))


def _most_likely(
    model: Any, tokenizer: Any, examples: Sequence[Example], prompts: Sequence[Prompt], batch_size: int
) -> list[float]:
    """For each question 1.0 if the right option's letter is the most probable reply, else 0.0."""
    asked = [(place, letter) for place, each in enumerate(examples) for letter in LETTERS[: len(each.choices)]]
    scores = completion_scores(
        model,
        tokenizer,
        [prompts[place] for place, _ in asked],
        [f"Answer: {letter}" for _, letter in asked],
        batch_size=batch_size,
        include_eos=False,
    )
    best: dict[int, tuple[float, str]] = {}
    for (place, letter), nll in zip(asked, scores.nll, strict=True):
        best[place] = min(best.get(place, (nll, letter)), (nll, letter))
    return [float(best[place][1] == example.answer) for place, example in enumerate(examples)]


def _measures(items: Sequence[Item]) -> dict[str, Interval]:
    out = {}
    for name in items[0].scored.values if items else ():
        values = [item.scored.values[name] for item in items]
        is_share = all(value in (0.0, 1.0) for value in values)
        out[name] = wilson(round(sum(values)), len(values)) if is_share else mean_interval(values)
    return out
