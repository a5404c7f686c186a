"""How long a reply may get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def token_limit(tokenizer: Any, completions: Sequence[str], times: float = 1.5) -> int:
    """Tokens of the longest of the right replies, so many `times`, and 8 more."""
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in completions)
    return math.ceil(times * longest) + 8
