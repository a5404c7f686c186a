"""What a comparison comes to, in a sentence or two for each group of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unisd.compare.groups import Group, Spread
from unisd.compare.tables import Score, results_of, verdict
from unisd.scoring import Interval, paired_difference

MOST_GROUPS = 3
"""With more, the table of scores is the shorter text."""


@dataclass(frozen=True)
class Change:
    """One number before and after, on the same items.

    Attributes:
        what: it is.
        before, after: shares, or perplexities.
        difference: in shares, or in nats a token, with its interval.
        is_share: which of the two.
    """

    what: str
    before: float
    after: float
    difference: Interval
    is_share: bool

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "" where the interval holds 0; a perplexity is better where it is lower."""
        found = verdict(self.difference)
        return found if self.is_share or not found else {"better": "worse", "worse": "better"}[found]


@dataclass(frozen=True)
class Finding:
    """A group against the first: what changed on the benchmarks, and how far it is from its base (nats a token)."""

    place: int
    name: str
    changes: list[Change]
    drift: Spread | None


def findings(groups: Sequence[Group], scores: Mapping[str, Sequence[Score]]) -> list[Finding]:
    """For each group but the first; [] where they are too many for a text, or nothing can be compared."""
    if len(groups) - 1 > MOST_GROUPS:
        return []
    found = []
    for place, group in list(enumerate(groups))[1:]:
        changes = []
        for name, row in scores.items():
            first, score = row[0], row[place]
            if score.difference is not None and first.value is not None and score.value is not None:
                changes.append(Change(name, first.value, score.value, score.difference, is_share=True))
            perplexity = _perplexity(groups[0], group, name)
            changes += [] if perplexity is None else [perplexity]
        if changes:
            found.append(Finding(place, group.name, changes, group.spread(lambda run: run.drift_kl)))
    return found


def _perplexity(first: Group, group: Group, name: str) -> Change | None:
    """Perplexity of the right replies, of single runs that have it on the same items."""
    results = [results_of(each, name) for each in (first, group)]
    if any(len(each) != 1 or each[0].kind != "procedural" for each in results):
        return None
    before, after = (each[0] for each in results)
    if not after.has_items_of(before) or not all(
        "gold_nll" in row for each in (before, after) for row in each.rows.values()
    ):
        return None
    nll = [[float(each.rows[n]["gold_nll"]) for n in sorted(each.rows)] for each in (before, after)]
    was, now = (float(each.result["overall"]["perplexity"]) for each in (before, after))
    return Change(f"perplexity of the right reply, {name}", was, now, paired_difference(nll[0], nll[1]), is_share=False)
