"""The interface of whatever generates text: requests with a seed each, replies as they become known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from unisd.turns import Prompt


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most probable token.
        max_new_tokens: a reply that has not ended by then is cut off.
        top_p: least probability mass of the tokens to draw from; 1 for all.
    """

    temperature: float = 0.7
    max_new_tokens: int = 256
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"temperature must be >= 0, top_p in ]0, 1] and max_new_tokens at least 1, got {self.temperature}, "
                f"{self.top_p} and {self.max_new_tokens}"
            )


@dataclass(frozen=True)
class Request:
    """A prompt and the seed of its reply, which depends on nothing else of the call."""

    prompt: Prompt
    seed: int = 0


class Generator(Protocol):
    """A model that writes replies.

    Attributes:
        identity: of model and weights, for caches.
        batch_size: requests that are worth giving at once; replies of a batch come together.
    """

    batch_size: int

    @property
    def identity(self) -> str: ...

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Places of the requests, in the batches in which they are best answered; a function of the requests alone."""
        ...

    def replies(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, str]]:
        """Pairs (place of the request, reply without special tokens), each request once, in any order."""
        ...
