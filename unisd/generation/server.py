"""Replies from a server with OpenAI's chat interface (vLLM's `vllm serve`, and many others)."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unisd.generation.interface import Request, Sampling

_AGAIN = (408, 409, 429, 500, 502, 503, 504)


class ServerGenerator:
    """A server by its URL, asked for several replies at a time.

    Args:
        url: for example `http://localhost:8000` or `http://localhost:8000/v1`.
        model: its name there; None asks the server, which must then serve one.
        concurrency: requests under way at a time.
        timeout: seconds until a reply counts as failed.
        retries: further tries after a failure that may pass (timeouts, 429, 5xx), with growing waits.

    The environment variable OPENAI_API_KEY, if set, is sent as the key.

    Raises:
        ValueError: no server there, or one that serves several models while none is named.
    """

    def __init__(
        self, url: str, model: str | None = None, *, concurrency: int = 16, timeout: float = 600.0, retries: int = 4
    ) -> None:
        base = url.rstrip("/")
        self._base = base if base.endswith("/v1") else f"{base}/v1"
        self._timeout, self._retries = timeout, retries
        self.batch_size = concurrency
        self._model = model if model is not None else self._only_model()
        self.identity: str = f"server:{self._base}:{self._model}"

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """The requests in their order."""
        places = list(range(len(requests)))
        return [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]

    def replies(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, str]]:
        with ThreadPoolExecutor(self.batch_size) as pool:
            for places in self.batches(requests):
                yield from zip(
                    places, pool.map(lambda place: self._reply(requests[place], sampling), places), strict=True
                )

    def _reply(self, request: Request, sampling: Sampling) -> str:
        prompt = request.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answer = self._call(
            "/chat/completions",
            {
                "model": self._model,
                "messages": messages,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": request.seed % 2**31,  # what every server takes
            },
        )
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self._base} answered without a message; is it a server of chat completions?") from None

    def _only_model(self) -> str:
        names = [str(entry["id"]) for entry in self._call("/models", None)["data"]]
        if len(names) != 1:
            raise ValueError(f"{self._base} serves {len(names)} models ({', '.join(names)}); name one as --model")
        return names[0]

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            try:
                request = urllib.request.Request(f"{self._base}{path}", data, headers)
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if last or error.code not in _AGAIN:
                    detail = error.read(300).decode(errors="replace")
                    raise ValueError(f"{self._base}{path} answered {error.code} {error.reason}: {detail}") from None
            except json.JSONDecodeError:
                raise ValueError(f"{self._base}{path} answered something else than JSON; is the URL right?") from None
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                if last:
                    reason = getattr(error, "reason", error)
                    raise ValueError(
                        f"{self._base}{path} does not answer ({reason}, {self._retries + 1} tries): is the server up?"
                    ) from None
            time.sleep(min(0.5 * 2**attempt, 30.0))
        raise AssertionError("unreachable")
