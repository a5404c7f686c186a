"""Keys and values of prefixes that many views begin with, kept while the teacher's weights stay as they are.

What is worth keeping is found from the rows themselves: two rows that begin with the same 64 tokens or more make what
they share a known prefix (a fixed set of demonstrations, the context of one prompt with several completions). Known
prefixes are only token ids and outlive the weights; their keys and values do not.
"""

from __future__ import annotations

import bisect
import warnings
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

import torch

from unisd.views.attention import KeyValues
from unisd.views.tree import Ids, common_length

MIN_KEPT = 64
"""Tokens of the shortest prefix that is kept."""
_SAME = 0.75  # Two prefixes that agree in this share of the longer one are one: rows may begin alike after the set.
_RECENT_ROWS = 256
_KNOWN_PREFIXES = 256


class PrefixCache:
    """Keys and values by prefix, at most `max_bytes` of them; the least recently used go first.

    Attributes:
        hits, stored, evicted: prefixes that were served, kept, and given up for want of room.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.stored = self.evicted = 0
        self._version: Hashable = None
        self._values: OrderedDict[Ids, list[KeyValues]] = OrderedDict()
        self._known: OrderedDict[Ids, None] = OrderedDict()
        self._recent: deque[Ids] = deque()
        self._sorted: list[Ids] = []

    def begin(self, version: Hashable) -> None:
        """Drop everything that was computed with weights of another version."""
        if version != self._version:
            self._values.clear()
            self._version = version

    def observe(self, rows: Sequence[Ids]) -> None:
        """Learn from rows which prefixes repeat."""
        for row in rows:
            place = bisect.bisect_left(self._sorted, row)
            neighbours = self._sorted[max(place - 1, 0) : place + 1]
            if row in neighbours:
                self._learn(row[:-1])
                continue
            shared = max((common_length(row, other) for other in neighbours), default=0)
            self._learn(row[: min(shared, len(row) - 1)])
            self._sorted.insert(place, row)
            self._recent.append(row)
            if len(self._recent) > _RECENT_ROWS:
                oldest = self._recent.popleft()
                del self._sorted[bisect.bisect_left(self._sorted, oldest)]

    def _learn(self, prefix: Ids) -> None:
        if len(prefix) < MIN_KEPT:
            return
        for known in list(self._known):
            shared = common_length(known, prefix)
            if shared < _SAME * max(len(known), len(prefix)):
                continue
            if shared == len(known):
                self._known.move_to_end(known)
                return
            # The known one was too long: keep what both share.
            del self._known[known]
            self._values.pop(known, None)
            prefix = prefix[:shared]
        self._known[prefix] = None
        if len(self._known) > _KNOWN_PREFIXES:
            dropped, _ = self._known.popitem(last=False)
            self._values.pop(dropped, None)

    def match(self, rows: Sequence[Ids]) -> tuple[list[Ids], list[int | None]]:
        """The kept prefixes that some row begins with, and for each row which (the longest), or None. A row is always
        longer than its prefix, since the state after a context is needed and only keys and values are kept."""
        return _match(rows, list(self._values))

    def missing(self, rows: Sequence[Ids]) -> dict[Ids, int]:
        """Known prefixes of the rows that are not kept, each with the place of a row that begins with it."""
        prefixes, of_row = _match(rows, list(self._known))
        found: dict[Ids, int] = {}
        for place, prefix in enumerate(of_row):
            if prefix is not None and prefixes[prefix] not in self._values:
                found.setdefault(prefixes[prefix], place)
        return found

    def get(self, prefixes: Sequence[Ids]) -> list[KeyValues]:
        """Keys and values of the prefixes in each layer, one prefix after another."""
        found = []
        for prefix in prefixes:
            self._values.move_to_end(prefix)
            found.append(self._values[prefix])
        self.hits += len(prefixes)
        return [
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in zip(*found, strict=True)
        ]

    def put(self, prefix: Ids, values: list[KeyValues]) -> None:
        """Keep the keys and values of a prefix, of each layer."""
        if _bytes(values) > self.max_bytes:
            self._tell(1)
            return
        self._values[prefix] = values
        self.stored += 1
        while sum(map(_bytes, self._values.values())) > self.max_bytes:
            self._values.popitem(last=False)
            self._tell(1)

    def _tell(self, count: int) -> None:
        if self.evicted == 0:
            warnings.warn(
                f"the prefixes that views share do not fit into view_cache_bytes={self.max_bytes}: some are computed "
                "again where they are used; raise it if there is memory",
                stacklevel=3,
            )
        self.evicted += count


def _match(rows: Sequence[Ids], prefixes: list[Ids]) -> tuple[list[Ids], list[int | None]]:
    used: dict[Ids, int] = {}
    of_row: list[int | None] = []
    longest_first = sorted(prefixes, key=len, reverse=True)
    for row in rows:
        found = next((p for p in longest_first if len(p) < len(row) and row[: len(p)] == p), None)
        of_row.append(None if found is None else used.setdefault(found, len(used)))
    return list(used), of_row


def _bytes(values: list[KeyValues]) -> int:
    return sum(each.numel() * each.element_size() for layer in values for each in layer)
