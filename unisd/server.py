"""A server with OpenAI's HTTP interface: requests side by side, that outlast a restart of it."""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from unisd.daemon_threads import DaemonThreads

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_AT_FIRST = 5.0
"""Seconds for which a server that has not answered yet is tried: a wrong URL should not take minutes to be told."""
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 10.0

logger = logging.getLogger(__name__)


class _MayPass(Exception):
    """A failure that a later try may not have."""


class Server:
    """A server by its URL, and the model there that is asked.

    Args:
        url: for example `http://localhost:8000` or `http://localhost:8000/v1`.
        model: its name there; None for the only one.
        setting: where a user names the model, for messages.
        concurrency: requests under way at a time.
        timeout: seconds until an answer counts as failed.
        patience: seconds after its first failure for which a request is tried again, if the failure may pass (no
            connection, a connection that breaks, timeouts, 429, 5xx); the log says when that begins and ends.

    The environment variable OPENAI_API_KEY, if set, is sent as the key.

    Attributes:
        base: the URL, with /v1.
        model: the name.
        outages: times that it has answered again after it had not; it may be another server since.

    Raises:
        ValueError: no server there, or one that serves several models while none is named.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        setting: str = "--model",
        concurrency: int = 16,
        timeout: float = 600.0,
        patience: float = 600.0,
    ) -> None:
        base = url.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        self._timeout, self._patience = timeout, patience
        self._pool = DaemonThreads(concurrency, "unisd-server")
        self._lock = threading.Lock()
        self._down_since: float | None = None
        self.outages = 0
        self.model: str = model if model is not None else self._only(setting)

    def models(self) -> dict[str, dict[str, Any]]:
        """What the server says of each of its models, by name (vLLM: `max_model_len` and more)."""
        listed = self._call("/models", None, threading.Event(), min(_AT_FIRST, self._patience))
        try:
            return {str(card["id"]): dict(card) for card in listed["data"]}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self.base}/models answered without models; is the URL right?") from None

    def post(self, path: str, bodies: Sequence[dict[str, Any]]) -> Callable[[], list[Any]]:
        """Send requests; the function that is returned waits for their answers, in the order of `bodies`.

        Raises:
            ValueError: (from that function) an answer that no further try would change, or none within `patience`.
                What is still under way is given up.
        """
        stop = threading.Event()
        futures = [self._pool.submit(self._call, path, {"model": self.model, **body}, stop) for body in bodies]

        def answers() -> list[Any]:
            try:
                return [future.result() for future in futures]
            except BaseException:
                # Else the others would go on trying.
                stop.set()
                for future in futures:
                    future.cancel()
                raise

        return answers

    def _only(self, setting: str) -> str:
        names = list(self.models())
        if len(names) != 1:
            raise ValueError(f"{self.base} serves {len(names)} models ({', '.join(names)}); name one as {setting}")
        return names[0]

    def _call(
        self, path: str, body: dict[str, Any] | None, stop: threading.Event, patience: float | None = None
    ) -> Any:
        patience = self._patience if patience is None else patience
        pause, failed_at = _FIRST_WAIT, None
        while True:
            try:
                answer = self._once(path, body)
            except _MayPass as error:
                now = time.monotonic()
                failed_at = now if failed_at is None else failed_at
                if now - failed_at >= patience or stop.is_set():
                    raise ValueError(
                        f"{self.base}{path}: {error}, tried for {now - failed_at:.0f} s: is the server up?"
                    ) from None
                self._say_down(str(error), patience)
                stop.wait(min(pause, patience - (now - failed_at)))
                pause = min(2 * pause, _LONGEST_WAIT)
            else:
                if failed_at is not None:
                    self._say_up()
                return answer

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            detail = error.read(300).decode(errors="replace")
            if error.code in _AGAIN:
                raise _MayPass(f"answered {error.code} {error.reason}: {detail}") from None
            raise ValueError(f"{self.base}{path} answered {error.code} {error.reason}: {detail}") from None
        except json.JSONDecodeError:
            raise ValueError(f"{self.base}{path} answered something else than JSON; is the URL right?") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise _MayPass(f"does not answer ({getattr(error, 'reason', error)})") from None

    def _say_down(self, reason: str, patience: float) -> None:
        with self._lock:
            if self._down_since is None:
                self._down_since = time.monotonic()
                logger.warning("%s: %s; trying again for %.0f s", self.base, reason, patience)

    def _say_up(self) -> None:
        with self._lock:
            if self._down_since is not None:
                seconds, self._down_since = time.monotonic() - self._down_since, None
                self.outages += 1
                logger.warning("%s: answers again, after %.0f s; what had failed is asked again", self.base, seconds)
