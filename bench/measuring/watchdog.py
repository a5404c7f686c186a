"""Guard against a call that hangs or kills the process: it costs itself, not the session.

While a peer runs, its name stands in a file beside the results; a call that does not return in time ends the
process with a traceback of every thread. Whoever starts the process again reads the file and goes past the culprit.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from unisd_kernels.files import replacing


class Watchdog:
    """Watches one call at a time.

    Args:
        file: holds the call in flight: not there while none is, or after one that returned.
        seconds: after which a call is taken to hang. The clock is real time and does not stop for the interpreter lock.
        stream: where the traceback goes; it needs a file descriptor.
    """

    def __init__(self, file: Path, seconds: float, stream: TextIO | None = None) -> None:
        self._file = file
        self._seconds = seconds
        self._stream = stream or sys.stderr

    @contextmanager
    def watching(self, **call: Any) -> Iterator[None]:
        """Around one call, which `call` describes, as JSON can hold it."""
        with replacing(self._file) as new:
            new.write_text(json.dumps({**call, "limit_seconds": self._seconds}))
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stream)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._file.unlink(missing_ok=True)

    def culprit(self) -> dict[str, Any] | None:
        """The call that an earlier process did not return from; forgets it."""
        if not self._file.exists():
            return None
        call = json.loads(self._file.read_text())
        self._file.unlink()
        return call
