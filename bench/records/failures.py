"""Reasons why a row has no figures: what a peer raises to say so, and the text that a table shows in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

OUT_OF_TIME = "left out: out of time"
NOT_OFFERED = "not offered: "


class NotOffered(Exception):
    """The peer does not have the operation, or not this divergence."""


class NotHere(Exception):
    """The peer does not run on this machine."""


def failure_text(error: Exception) -> str:
    """The text that a table shows in place of a time."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines[0] if lines else "no message").replace("|", "/")
    text = first if len(first) <= 160 else first[:157] + "..."
    if isinstance(error, NotOffered):
        return NOT_OFFERED + text
    if isinstance(error, NotHere):
        return f"not on this machine: {text}"
    return f"{type(error).__name__}: {text}"


def left_out(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Peers that a deadline left out."""
    return [
        {"case": row["case"], "peers": [row["peer"]], "reason": row["failure"]}
        for row in rows
        if row.get("failure") == OUT_OF_TIME
    ]
