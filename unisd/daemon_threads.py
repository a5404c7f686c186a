"""Work on a few threads that no process waits for when it ends: what is still under way then is dropped."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Work = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class DaemonThreads:
    """Like `concurrent.futures.ThreadPoolExecutor`, whose threads an interpreter joins before it ends.

    Args:
        most: threads at a time, each started when it is first needed.
        name: of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name, self._started = most, name, 0
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        weakref.finalize(self, _dismiss, self._queue, most)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put((future, function, arguments))
        with self._lock:
            if self._started < self._most:
                self._started += 1
                name = f"{self._name}-{self._started}"
                threading.Thread(target=_work, args=(self._queue,), name=name, daemon=True).start()
        return future


def _work(queue: SimpleQueue[_Work | None]) -> None:
    while (work := queue.get()) is not None:
        future, function, arguments = work
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = function(*arguments)
        except BaseException as error:  # told by `Future.result`
            future.set_exception(error)
        else:
            future.set_result(result)


def _dismiss(queue: SimpleQueue[_Work | None], threads: int) -> None:
    for _ in range(threads):
        queue.put(None)
