"""Order of the rows, such that a resumed run reads them as the uninterrupted one would have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


class EpochSampler(Sampler):
    """TRL's sampler with an order that depends on seed and epoch alone.

    TRL draws the orders of all epochs from one generator, which a resumed run starts anew: from the second epoch on
    it would read the rows in another order than the uninterrupted run.

    A run that is resumed from the checkpoint of its last step gets no rows: `transformers.Trainer` asks whether it is
    at the end only after a step, and would make one too many.
    """

    def __init__(
        self, sampler: RepeatSampler, seed: int, epoch: Callable[[], int], is_over: Callable[[], bool]
    ) -> None:
        self._sampler = sampler
        self._seed = seed
        self._epoch = epoch
        self._is_over = is_over

    def __iter__(self) -> Iterator[int]:
        if self._is_over():
            return
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed(self._seed + self._epoch())
        yield from self._sampler

    def __len__(self) -> int:
        return len(self._sampler)
