"""Scores of many replies to the examples of one task: numbers in [0, 1] for each, by the name of a measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unisd.sandbox import Sandbox
from unisd.scoring.choice import lenient_letter, strict_letter
from unisd.scoring.code import code_in, run_codes
from unisd.scoring.tools import calls_of, score_calls
from unisd.tasks.base import Example
from unisd.tasks.reading import KINDS
from unisd.tasks.text import plain

MEASURES: dict[str, tuple[str, ...]] = {
    "choice": ("strict", "lenient", "strict_extracted", "lenient_extracted"),
    "code": ("pass@1", "format", "timed_out"),
    "tools": ("full", "action", "arguments", "extracted"),
    "open": ("exact",),
    "procedural": ("accuracy", "answered"),
    "diagnostic": ("first_answer", "all_exact", "exact_steps", "executed_steps"),
    "likelihood": ("acc", "acc_norm"),
}
"""Kind of task -> its measures, the one that counts first. "procedural" and "diagnostic" are scored by
`unisd.evaluation`, "likelihood" is of lm-evaluation-harness only."""


@dataclass(frozen=True)
class Scored:
    """What a reply is worth.

    Attributes:
        values: measure -> number in [0, 1].
        found: what was read out of the reply, in short; "" for nothing.
    """

    values: dict[str, float]
    found: str = ""


def score_replies(
    kind: str,
    examples: Sequence[Example],
    replies: Sequence[str],
    *,
    unsafe_code: bool = False,
    progress: bool = False,
) -> list[Scored]:
    """Score every reply.

    Args:
        kind: of the task, one of `unisd.tasks.KINDS`.
        unsafe_code: run code without bubblewrap, see `unisd.sandbox.Sandbox`.
        progress: whether to show a bar where it takes time.

    Raises:
        ValueError: an unknown kind, different numbers of examples and replies, or no sandbox for code.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if len(examples) != len(replies):
        raise ValueError(f"got {len(examples)} examples and {len(replies)} replies")
    if kind == "code":
        return _code(examples, replies, Sandbox(unsafe_code), progress)
    of_one = {"choice": _choice, "tools": _tools, "open": _open}[kind]
    return [of_one(example, reply) for example, reply in zip(examples, replies, strict=True)]


def _choice(example: Example, reply: str) -> Scored:
    strict, lenient = (read(reply, len(example.choices)) for read in (strict_letter, lenient_letter))
    values = {
        "strict": strict == example.answer,
        "lenient": lenient == example.answer,
        "strict_extracted": strict is not None,
        "lenient_extracted": lenient is not None,
    }
    return Scored({name: float(value) for name, value in values.items()}, lenient or "")


def _tools(example: Example, reply: str) -> Scored:
    calls = calls_of(reply)
    score = score_calls(example, calls)
    values = {"full": score.full, "action": score.action, "arguments": score.arguments, "extracted": calls is not None}
    return Scored({name: float(value) for name, value in values.items()}, ", ".join(name for name, _ in calls or ()))


def _open(example: Example, reply: str) -> Scored:
    return Scored({"exact": float(plain(reply) == plain(example.answer))})


def _code(examples: Sequence[Example], replies: Sequence[str], sandbox: Sandbox, progress: bool) -> list[Scored]:
    codes = [code_in(example, reply) for example, reply in zip(examples, replies, strict=True)]
    scored = []
    for outcome in run_codes(examples, codes, sandbox, progress=progress):
        status = outcome.status if outcome else "no code"
        values = {
            "pass@1": float(status == "passed"),
            "format": float(outcome is not None),
            "timed_out": float(status == "timed out"),
        }
        scored.append(Scored(values, f"{status} {outcome.exception}".strip() if outcome else status))
    return scored
