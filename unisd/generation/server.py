"""Replies from a server with OpenAI's chat interface (vLLM's `vllm serve`, and many others)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from unisd.generation.interface import Request, Sampling
from unisd.server import Server


class ServerGenerator:
    """A server by its URL, asked for several replies at a time.

    Args:
        url, model, concurrency, options: as in `unisd.server.Server`, which says what a failure does.

    Raises:
        ValueError: no server there, or one that serves several models while none is named.
    """

    def __init__(self, url: str, model: str | None = None, *, concurrency: int = 16, **options: Any) -> None:
        self._server = Server(url, model, concurrency=concurrency, **options)
        self.batch_size = concurrency
        self.identity: str = f"server:{self._server.base}:{self._server.model}"

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """The requests in their order."""
        places = list(range(len(requests)))
        return [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]

    def replies(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, str]]:
        for places in self.batches(requests):
            answers = self._server.post("/chat/completions", [_body(requests[place], sampling) for place in places])()
            yield from zip(places, map(self._text, answers), strict=True)

    def _text(self, answer: Any) -> str:
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"{self._server.base} answered without a message; is it a server of chat completions?"
            ) from None


def _body(request: Request, sampling: Sampling) -> dict[str, Any]:
    prompt = request.prompt
    return {
        "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed % 2**31,  # what every server takes
    }
