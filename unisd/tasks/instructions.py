"""Induced instructions: what a model is asked for, and what is accepted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unisd.tasks.rejected import Rejected
from unisd.tasks.text import longest_common_run, plain, words

FEWEST_SENTENCES, MOST_SENTENCES = 3, 4
MOST_WORDS = 140
SHARED_RUN = 6
"""Words in a row that an instruction may not share with an example; shorter runs are everyday phrases."""


def request(solved: Sequence[str]) -> str:
    """Text that asks for one general instruction from solved examples."""
    shown = "\n\n".join(f"Example {number}\n{text}" for number, text in enumerate(solved, 1))
    return (
        f"Here are solved examples of one kind of task.\n\n{shown}\n\n"
        "Write one general instruction for solving new tasks of this kind: three or four sentences about how to "
        "proceed and what to watch out for. Name nothing that occurs in the examples, give no answer and no code. "
        "Reply with the instruction only."
    )


def read(reply: str, examples: Sequence[tuple[str, str]]) -> str:
    """The instruction in a reply.

    Args:
        examples: question and demonstration of each example.

    Raises:
        Rejected: none, one of another length, with code, or with content of an example.
    """
    text = re.sub(r"^\W*(general )?(instruction|advice)s?\W*:\s*", "", reply.strip(), flags=re.IGNORECASE).strip()
    text = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", text, flags=re.MULTILINE)
    if not words(text):
        raise Rejected("the instruction is empty")
    if "```" in text or re.search(r"^\s*(def |import |from \w+ import )", text, re.MULTILINE):
        raise Rejected("the instruction holds code")
    if re.search(r"\b(final )?answer( is)?\s*:?\s*\(?[A-H]\b\)?(?![a-z' ])", text):
        raise Rejected("the instruction gives an answer")
    # A model that goes on and on is cut after its fourth sentence rather than refused.
    sentences = re.split(r"(?<=[.!?])\s+", text)
    text = re.sub(r"\s+", " ", " ".join(sentences[:MOST_SENTENCES])).strip()
    if len(words(text)) > MOST_WORDS:
        raise Rejected("the instruction is too long")
    if text[-1] not in ".!?":
        raise Rejected("the instruction was cut off")
    if len(sentences) < FEWEST_SENTENCES:
        raise Rejected(f"the instruction has fewer than {FEWEST_SENTENCES} sentences")
    for question, demonstration in examples:
        if longest_common_run(text, f"{question}\n{demonstration}") >= SHARED_RUN:
            raise Rejected("the instruction repeats an example")
        if len(words(demonstration)) > 1 and plain(demonstration) in plain(text):
            raise Rejected("the instruction holds an answer")
    return text
