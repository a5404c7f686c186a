"""Rows of token ids as a tree in which a shared beginning stands once.

The state of a token depends on the tokens before it and on nothing else (causal attention, positions counted from the
first token), so rows that begin alike have the same states there. A tree is run as one row of its tokens, segment after
segment, each token at its own position and attending to its own path (`unisd.views.attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

MIN_SHARED = 16
"""A shorter common piece is run once a row: a segment of its own would cost more than it saves."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Tokens that stand together: keys `start` to `start + length`, at positions from `depth` on.

    Attributes:
        path: keys of all tokens before it, in order; [depth] int64.
    """

    start: int
    length: int
    path: torch.Tensor

    @property
    def depth(self) -> int:
        return self.path.numel()

    @property
    def keys(self) -> torch.Tensor:
        """Keys of its path and of itself, [depth + length]."""
        return torch.cat([self.path, torch.arange(self.start, self.start + self.length)])


@dataclass
class PrefixTree:
    """Tree of R rows. Keys 0 to `num_cached` are tokens whose keys and values are known from an earlier pass; the
    tokens that a pass runs have the keys after them.

    Attributes:
        num_cached: keys of cached prefixes.
        segments: what is run.
        tokens: ids of what is run, in the order of their keys.
        paths: of each row, the keys of its tokens from first to last.
    """

    num_cached: int
    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    paths: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        rows: Sequence[Ids],
        cached: Sequence[Ids] = (),
        of_row: Sequence[int | None] | None = None,
        *,
        share: bool = True,
    ) -> PrefixTree:
        """The tree of `rows`.

        Args:
            cached: prefixes whose keys come first, one after another.
            of_row: for each row the place in `cached` of a prefix that it begins with, or None.
            share: run once what rows have in common; else each row is a segment.
        """
        lengths = [len(prefix) for prefix in cached]
        starts = [sum(lengths[:place]) for place in range(len(cached))]
        tree = cls(sum(lengths))
        tree.paths = [torch.empty(0, dtype=torch.long)] * len(rows)
        groups: dict[int | None, list[int]] = {}
        for place in range(len(rows)):
            groups.setdefault(None if of_row is None else of_row[place], []).append(place)
        for prefix, places in groups.items():
            path = torch.empty(0, dtype=torch.long)
            if prefix is not None:
                path = torch.arange(starts[prefix], starts[prefix] + lengths[prefix])
            places.sort(key=lambda place: rows[place])
            common = [common_length(rows[a], rows[b]) if share else 0 for a, b in pairwise(places)]
            tree._grow([rows[place] for place in places], places, common, path)
        return tree

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token that is run, [N]."""
        parts = [torch.arange(each.depth, each.depth + each.length) for each in self.segments]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)

    def _grow(self, rows: list[Ids], places: list[int], common: list[int], path: torch.Tensor) -> None:
        """Add sorted rows that share what `path` holds; `common[i]` is what rows i and i + 1 share from the start."""
        depth = path.numel()
        shared = min(common, default=len(rows[0]))
        if shared >= depth + MIN_SHARED or len(rows) == 1:
            if shared > depth:
                segment = Segment(self.num_cached + len(self.tokens), shared - depth, path)
                self.segments.append(segment)
                self.tokens.extend(rows[0][depth:shared])
                path, depth = segment.keys, shared
            if len(rows) == 1:
                self.paths[places[0]] = path
                return
        # At least one neighbour shares less: what all share is in `path` by now, or too short for a segment.
        ends = [place + 1 for place, each in enumerate(common) if each < depth + MIN_SHARED]
        for start, end in zip([0, *ends], [*ends, len(rows)], strict=True):
            self._grow(rows[start:end], places[start:end], common[start : end - 1], path)


def common_length(a: Ids, b: Ids) -> int:
    """Number of tokens with which both begin."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # a[:low] == b[:low] and a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
