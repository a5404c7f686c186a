"""Replies of a model, kept in the user's cache: written batch by batch, shared between runs, there after a kill."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tqdm.auto import tqdm

from unisd.generation import Generator, Request, Sampling
from unisd_kernels.cache import cache_directory

_CREATE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"


class ReplyStore:
    """A file of replies by model, prompt, seed and sampling.

    Args:
        generator: writes what is not there.
        file: default: `replies.sqlite` in the user's cache.
    """

    def __init__(self, generator: Generator, file: Path | None = None) -> None:
        self._generator = generator
        self._identity = generator.identity
        self._file = file or cache_directory() / "replies.sqlite"
        self._file.parent.mkdir(parents=True, exist_ok=True)

    def replies(self, requests: Sequence[Request], sampling: Sampling, progress: str | None = None) -> list[str]:
        """The replies to all requests, in their order.

        A batch of which a reply is missing is generated whole: its composition, and so every bit of its replies, does
        not depend on where an earlier run was killed.

        Args:
            progress: what to write before the bar; None for no bar.
        """
        keys = [self._key(request, sampling) for request in requests]
        found: dict[str, str] = {}
        # Each statement is a transaction of its own; another process may write meanwhile.
        with closing(sqlite3.connect(self._file, timeout=300.0, isolation_level=None)) as connection:
            connection.execute(_CREATE)
            found.update(_known(connection, keys))
            bar = tqdm(total=len(requests), desc=progress, disable=progress is None, unit="reply")
            with bar:
                for places in self._generator.batches(requests):
                    if any(keys[place] not in found for place in places):
                        batch = [requests[place] for place in places]
                        written = dict(self._generator.replies(batch, sampling))
                        rows = [(keys[places[i]], reply) for i, reply in written.items()]
                        connection.execute("BEGIN IMMEDIATE")
                        connection.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?)", rows)
                        connection.execute("COMMIT")
                        # What another process wrote first is what later runs will read.
                        found.update(_known(connection, [key for key, _ in rows]))
                    bar.update(len(places))
        return [found[key] for key in keys]

    def _key(self, request: Request, sampling: Sampling) -> str:
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        parts = [self._identity, prompt, request.seed, sampling.temperature, sampling.top_p, sampling.max_new_tokens]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _known(connection: sqlite3.Connection, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    for start in range(0, len(keys), 500):
        part = keys[start : start + 500]
        marks = ",".join("?" * len(part))
        yield from connection.execute(f"SELECT key, reply FROM replies WHERE key IN ({marks})", part)
