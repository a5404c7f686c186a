"""Multiple choice: the letter that a reply chooses.

Strict is the form that the prompt asks for, in the last line: "Answer: X" or "(X)". Lenient adds, in this order and
each time the last one in the reply: "Answer: X" anywhere, "the answer is X", "X." or "X)" at the start of a line, and a
letter by itself. The last takes the article "A" for a choice, so that both measures are worth reporting.
"""

from __future__ import annotations

import re

from unisd.tasks.multiple_choice import LETTERS

_EDGE = r"[\s*_`>#.\"']*"
_STRICT = re.compile(rf"{_EDGE}(?:(?i:answer){_EDGE}:{_EDGE}\(?([A-J])\)?|\(([A-J])\)){_EDGE}\Z")
_LENIENT = (
    re.compile(r"(?i:answer)[\s*_`]*:[\s*_`]*\(?([A-J])\b(?![' ]?[a-z])"),
    re.compile(r"(?i:answer\s+is)[\s:*_`]*(?i:option\s+|choice\s+)?\(?([A-J])\b(?![' ]?[a-z])"),
    re.compile(r"^[\s*_`(]*([A-J])[.)]", re.MULTILINE),
    re.compile(r"(?<![\w'])([A-J])(?![\w'])"),
)


def strict_letter(reply: str, num_choices: int) -> str | None:
    """The letter in the form that was asked for, or None."""
    lines = [line for line in reply.splitlines() if line.strip()]
    found = _STRICT.fullmatch(lines[-1]) if lines else None
    return _valid(found[1] or found[2], num_choices) if found else None


def lenient_letter(reply: str, num_choices: int) -> str | None:
    """The letter in any form, or None."""
    strict = strict_letter(reply, num_choices)
    if strict is not None:
        return strict
    for pattern in _LENIENT:
        valid = [letter for letter in pattern.findall(reply) if _valid(letter, num_choices)]
        if valid:
            return valid[-1]
    return None


def _valid(letter: str, num_choices: int) -> str | None:
    return letter if letter in LETTERS[:num_choices] else None
