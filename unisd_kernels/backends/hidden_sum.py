"""The hidden gradient of a sliced head: the ranks' parts are added up some rows at a time, while later rows are made.

Its bytes are nearly all that the ranks of a vocabulary exchange. A message is on its way while the next rows are
multiplied, and is waited for when the walk is over, before anybody reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from unisd_kernels.backends.buffers import spans, whole_tiles
from unisd_kernels.heads.shard import VocabShard

if TYPE_CHECKING:
    from torch.distributed import Work

# The largest message: rings are near their bandwidth there, and the last one, which nothing hides, is short.
MESSAGE_BYTES = 16 << 20


class HiddenSum:
    """Sum over the ranks, in place, of a gradient [N, H] that is written from its first row to its last.

    Messages are of rows that N, H and the dtype alone choose, so they are the same on all ranks, however these cut
    their walks. For a whole head, or without a gradient, nothing is sent and nothing is cut.

    No wait follows an exception: another rank may never send its part, and whoever runs the message (gloo's threads,
    NCCL's watchdog) keeps its memory.
    """

    def __init__(self, shard: VocabShard | None, gradient: torch.Tensor | None) -> None:
        self._shard = shard
        self._gradient = gradient
        self._unsent: deque[slice] = deque()
        self._on_the_way: list[Work] = []
        self._rows = 0  # of a message; 0: nothing is sent
        if shard is not None and gradient is not None:
            num_rows, width = gradient.shape
            self._rows = whole_tiles(max(1, MESSAGE_BYTES // (width * gradient.itemsize)))
            self._unsent.extend(spans(num_rows, self._rows))

    def pieces(self, num_rows: int) -> Iterator[slice]:
        """Rows of a chunk that are multiplied at a time, so that a large one is not on the way all at once."""
        return spans(num_rows, self._rows or max(num_rows, 1))

    def written(self, end: int) -> None:
        """Send what is complete now that the rows before `end` are written. Until `finish` nobody writes them again."""
        while self._unsent and self._unsent[0].stop <= end:
            assert self._shard is not None
            assert self._gradient is not None
            self._on_the_way.append(self._shard.start_sum(self._gradient[self._unsent.popleft()]))

    def finish(self) -> None:
        """Send the rest, and wait until the sums of all rows are here."""
        if self._unsent:
            self.written(self._unsent[-1].stop)
        for message in self._on_the_way:
            message.wait()
