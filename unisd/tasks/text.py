"""Reading of what models write: JSON with talk around it, code in fences; and how much one text repeats another."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

_FENCE = re.compile(r"```[ \t]*([A-Za-z0-9_+-]*)[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def json_values(text: str) -> Iterator[Any]:
    """Every JSON object or list in a text, from the left; talk and fences around them are passed over."""
    decoder = json.JSONDecoder(strict=False)
    place = 0
    while (match := re.compile(r"[{\[]").search(text, place)) is not None:
        try:
            value, place = decoder.raw_decode(text, match.start())
        except ValueError:
            place = match.start() + 1
            continue
        yield value


def json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text."""
    return next((value for value in json_values(text) if isinstance(value, dict)), None)


def code_of(text: str) -> str:
    """The code in a reply: of its first fence, preferring Python's, else the whole text."""
    fences = _FENCE.findall(text)
    named = [body for language, body in fences if language.lower() in ("python", "py", "python3")]
    body = named[0] if named else fences[0][1] if fences else text
    return body.strip("\r\n")


def plain(text: str) -> str:
    """A text for comparisons: Unicode, case and blanks made one, punctuation at the ends left out."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip().strip(" .?!,:;\"'`")


def words(text: str) -> list[str]:
    """Its words and numbers, casefolded."""
    return re.findall(r"[^\W_]+", text.casefold())


def longest_common_run(text: str, other: str) -> int:
    """Number of consecutive words of `text` that also stand, one after the other, in `other`."""
    mine, theirs = words(text), words(other)
    best = 0
    ends: dict[int, int] = {}
    positions: dict[str, list[int]] = {}
    for place, word in enumerate(theirs):
        positions.setdefault(word, []).append(place)
    for word in mine:
        now = {place: ends.get(place - 1, 0) + 1 for place in positions.get(word, ())}
        best = max(best, max(now.values(), default=0))
        ends = now
    return best
