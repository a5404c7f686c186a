"""Which questions are the same: a row must not be shown its own question with its answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence


def question_key(question: str) -> str:
    """The question without what may differ between two copies of it: case, blanks, punctuation at the ends, Unicode's
    several spellings of a character."""
    text = unicodedata.normalize("NFKC", question).casefold()
    return re.sub(r"\s+", " ", text).strip().strip(" .?!:;\"'")


def question_groups(questions: Sequence[str]) -> list[int]:
    """For each question the number of its group; the same questions are one group."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(question_key(question), len(numbers)) for question in questions]
