"""Ranks as threads of one process, whose collectives are counted: for what needs many ranks but no real network."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from torch import distributed

T = TypeVar("T")


class Message(NamedTuple):
    """One collective, as a rank called it."""

    kind: str  # "maximum", "sum", "started sum" or "gather"
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Rank:
    """One rank, in the place of a process group."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self._rank = world, rank
        self.messages: list[Message] = []
        self.events: list[str] = []  # what was done in which order: messages, waits, and what a test adds

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.world.size

    def exchange(self, message: Message, value: torch.Tensor) -> list[torch.Tensor]:
        """The values of all ranks, in their order. All must call the same."""
        self.messages.append(message)
        self.events.append(message.kind)
        self.world.slots[self._rank] = (message, value.detach().clone())
        self.world.wait()
        kinds, values = zip(*self.world.slots, strict=True)
        self.world.wait()
        assert len(set(kinds)) == 1, f"ranks in different collectives: {kinds}"
        return list(values)


class World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60.0)
        # One rank computes at a time: Triton's interpreter knows no threads.
        self.turn = threading.Lock()

    def wait(self) -> None:
        """Until all ranks are here."""
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


class Started:
    """A sum on its way: nothing of it is in the tensor before the wait, and nobody may have written there."""

    def __init__(self, rank: Rank, tensor: torch.Tensor, total: torch.Tensor) -> None:
        self.rank, self.tensor, self.total, self.sent = rank, tensor, total, tensor.clone()

    def wait(self) -> None:
        self.rank.events.append("wait")
        torch.testing.assert_close(self.tensor, self.sent, rtol=0.0, atol=0.0, equal_nan=True)
        self.tensor.copy_(self.total)


def _all_reduce(
    tensor: torch.Tensor, op: Any = distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Started | None:
    maximum = op == distributed.ReduceOp.MAX
    kind = "maximum" if maximum else "started sum" if async_op else "sum"
    message = Message(kind, tuple(tensor.shape), tensor.dtype)
    total, *others = group.exchange(message, tensor)
    for other in others:
        total = torch.maximum(total, other) if maximum else total + other
    if async_op:
        return Started(group, tensor, total)
    tensor.copy_(total)
    return None


def _all_gather(out: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
    for place, value in zip(out, group.exchange(Message("gather", tuple(tensor.shape), tensor.dtype), tensor)):
        place.copy_(value)


def run(size: int, function: Callable[[Rank], T]) -> tuple[list[T], list[Rank]]:
    """What the function returns on each rank, and the ranks. The first error of a rank is raised here."""
    world = World(size)
    ranks = [Rank(world, rank) for rank in range(size)]
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def on(rank: int) -> None:
        with world.turn:
            try:
                results[rank] = function(ranks[rank])
            except threading.BrokenBarrierError:
                pass  # another rank's error, which is in the list; or one that did not come
            except BaseException as error:
                errors.append(error)
                world.barrier.abort()

    threads = [threading.Thread(target=on, args=(rank,)) for rank in range(size)]
    with (
        mock.patch("torch.distributed.all_reduce", _all_reduce),
        mock.patch("torch.distributed.all_gather", _all_gather),
        mock.patch("torch.distributed.get_process_group_ranks", lambda group: list(range(group.size()))),
    ):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    assert not world.barrier.broken, "a rank waited for others that did not come"
    return results, ranks


def counted(rank: Rank) -> Counter[str]:
    """Messages by kind."""
    return Counter(message.kind for message in rank.messages)
