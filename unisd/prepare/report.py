"""What became of the rows, in counts and reasons; never their contents."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PrepareReport:
    """Counts of one preparation.

    Attributes:
        kind: of task.
        read, kept: rows.
        duplicates: rows whose question another row also asks; they are kept, but never shown to each other.
        dropped: reasons with counts.
        contexts: of the auxiliary prompts, in words.
        negatives: in words.
        asked, replies: requests for negatives, and replies that were read for them.
        rejected: reasons of rejected replies with counts.
        longest: view -> most tokens, of the rows that were kept; empty where lengths are not known.
        seconds: by part.
        peak_memory_gib: highest resident set of the process by then; it holds the model that wrote, if one did.
    """

    kind: str = ""
    read: int = 0
    kept: int = 0
    duplicates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    contexts: str = ""
    negatives: str = ""
    asked: int = 0
    replies: int = 0
    valid: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    longest: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gib: float | None = None

    def lines(self) -> list[str]:
        """For a terminal."""
        kinds = {"open": "open questions", "choice": "multiple choice", "code": "code", "tools": "tool use"}
        out = [f"{self.kept} of {self.read} rows kept ({kinds.get(self.kind, self.kind)})"]
        out += [f"  {count} dropped: {reason}" for reason, count in self.dropped.most_common()]
        if self.duplicates:
            out.append(f"  {self.duplicates} ask another row's question; such rows are never shown to each other")
        if self.contexts:
            out.append(f"contexts: {self.contexts}")
        if self.negatives:
            out.append(f"negatives: {self.negatives}")
        if self.asked and self.replies:
            out.append(
                f"  {self.valid} of {self.asked} valid; {self.rejected.total()} of {self.replies} replies rejected"
            )
        out += [f"  {count} x {reason}" for reason, count in self.rejected.most_common()]
        if self.longest:
            out.append("longest: " + ", ".join(f"{view} {length}" for view, length in self.longest.items()) + " tokens")
        if self.peak_memory_gib is not None:
            parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
            out.append(f"took: {parts}; at most {self.peak_memory_gib:.2f} GiB of memory")
        return out

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}
