"""Auxiliary views scored by a server: the `prompt_logprobs` of the sampled tokens, as vLLM's server answers them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from unisd.batch import CompletionRows
from unisd.server import Server
from unisd.views.scorer import View, unpadded, view_contexts

if TYPE_CHECKING:
    from unisd.config import UniSDConfig

VIEW_SCORERS = ("local", "server")
MOST_APART = 0.1
"""Nats in the mean by which a server that has the right weights may differ, in whatever precision it computes."""
_SETTINGS = ("view_scorer_url", "view_scorer_model")

logger = logging.getLogger(__name__)


class ServerScorer:
    """A server that has the base model: it scores sequences of token ids, so that no text is tokenized anew.

    Args:
        server: answers `/completions` with `prompt_logprobs`, which are those of temperature 1.

    Attributes:
        requests: sent so far.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._compared_after: int | None = None  # outages
        self.requests = 0

    def is_compared(self, *, once: bool) -> bool:
        """Whether `compare` has been called, and unless `once` is enough, since the server was last away."""
        return self._compared_after == self._server.outages or (once and self._compared_after is not None)

    def begin(self, batch: dict[str, Any], rows: CompletionRows, views: Sequence[View]) -> Callable[[], torch.Tensor]:
        contexts, completions = view_contexts(batch, views), unpadded(batch["completion_ids"], batch["completion_mask"])
        size, width = len(completions), batch["completion_ids"].shape[1]
        positions = rows.positions.tolist()
        ends: dict[int, int] = {}  # sequence with a counted token -> the place after its last one
        for position in positions:
            ends[position // width] = position % width + 1
        items = [
            (contexts[view * size + sequence], completions[sequence][:end])
            for view in range(len(views))
            for sequence, end in ends.items()
        ]
        answers = self._server.post("/completions", [_body(context + completion) for context, completion in items])
        self.requests += len(items)

        def scores() -> torch.Tensor:
            found = [self._read(answer, *item) for answer, item in zip(answers(), items, strict=True)]
            place = {sequence: number for number, sequence in enumerate(ends)}
            values = [
                [found[view * len(ends) + place[position // width]][position % width] for position in positions]
                for view in range(len(views))
            ]
            return torch.tensor(values, dtype=torch.float32).reshape(len(views), -1).to(rows.ids.device)

        return scores

    def compare(self, local: torch.Tensor, served: torch.Tensor) -> None:
        """Verify that the server scores as the teacher here does.

        Args:
            local, served: log-probabilities of the same tokens.

        Raises:
            ValueError: they are further apart than another precision explains.
        """
        self._compared_after = self._server.outages
        if not local.numel():
            return
        apart = (local.double() - served.double()).abs()
        mean, most = apart.mean().item(), apart.max().item()
        if not mean <= MOST_APART:
            raise ValueError(
                f"{self._server.base} scores {self._server.model!r} {mean:.2g} nats a token apart from the base model "
                f"here (at most {MOST_APART} is a matter of precision): it has other weights or another tokenizer, or "
                "a temperature other than 1; serve the model that this run starts from"
            )
        logger.info(
            "%s scores as the base model here: %.1e nats a token apart in the mean, %.1e at most",
            self._server.base,
            mean,
            most,
        )

    def _read(self, answer: Any, context: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
        """Log-probabilities of a completion's tokens from the answer to a request."""
        try:
            listed = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            listed = None
        if listed is None:
            raise ValueError(
                f"{self._server.base} answered without prompt_logprobs, which view_scorer='server' needs (vLLM's "
                "has them); use another server, or view_scorer='local'"
            )
        if len(listed) != len(context) + len(completion):
            raise ValueError(
                f"{self._server.base} scored {len(listed)} tokens of a sequence of {len(context) + len(completion)}: "
                "it cuts or adds tokens (truncate_prompt_tokens?); it has to take token ids as they are"
            )
        try:
            return [
                float(of_place[str(token)]["logprob"])
                for of_place, token in zip(listed[len(context) :], completion, strict=True)
            ]
        except (KeyError, TypeError):
            raise ValueError(
                f"{self._server.base} scored other tokens than it was given: it tokenizes anew; it has to take token "
                "ids as they are"
            ) from None


def served_scorer(args: UniSDConfig, num_processes: int = 1) -> ServerScorer | None:
    """The server that scores the auxiliary views of a run, if one does.

    Args:
        num_processes: of the run; each asks for the sequences that are its own.

    Raises:
        ValueError: it does not answer, has another model than the named one, or takes shorter sequences; the other
            processes would not wait as long as one that asks it again.
    """
    if args.view_scorer == "local":
        return None
    if num_processes > 1 and args.view_scorer_patience >= args.ddp_timeout:
        raise ValueError(
            f"view_scorer_patience={args.view_scorer_patience:g} is not below ddp_timeout={args.ddp_timeout}, after "
            "which the other processes no longer wait for one whose server is away: raise ddp_timeout, or lower it"
        )
    server = Server(
        str(args.view_scorer_url),
        args.view_scorer_model,
        setting="view_scorer_model",
        concurrency=args.view_scorer_concurrency,
        timeout=args.view_scorer_timeout,
        patience=args.view_scorer_patience,
    )
    models = server.models()
    if server.model not in models:
        raise ValueError(
            f"view_scorer_model={server.model!r} is none of the models that {server.base} serves: {', '.join(models)}"
        )
    most = models[server.model].get("max_model_len")
    if most is not None and args.max_prompt_length is not None:
        needed = args.max_prompt_length + int(args.max_completion_length or 0) + 1  # it samples a token, too
        if most < needed:
            raise ValueError(
                f"{server.base} takes {most} tokens of {server.model!r}, less than max_prompt_length + "
                f"max_completion_length + 1 = {needed}: start it with --max-model-len {needed}, or lower a limit here"
            )
    return ServerScorer(server)


def check_view_scorer(args: UniSDConfig) -> None:
    """Raise ValueError for settings that do not go with who scores the auxiliary views."""
    if args.view_scorer == "local":
        given = [name for name in _SETTINGS if getattr(args, name) is not None]
        if given:
            raise ValueError(f"{given[0]}={getattr(args, given[0])!r} has no effect without view_scorer='server'")
        return
    if not str(args.view_scorer_url or "").startswith(("http://", "https://")):
        raise ValueError(
            f"view_scorer='server' needs view_scorer_url, such as http://localhost:8000, got {args.view_scorer_url!r}"
        )
    if not args.uses_agreement:
        raise ValueError("view_scorer='server' scores the views of agreement, and agreement='none'; leave it out")
    if args.teacher != "base":
        raise ValueError(
            f"view_scorer='server' scores with weights that stand still, and the teacher is {args.teacher!r} with "
            f"ema={args.ema!r}: set teacher='base' and ema='none', or view_scorer='local'"
        )
    if args.teacher_mixture == "consensus":
        raise ValueError(
            "teacher_mixture='consensus' needs the hidden states of the auxiliary views, of which a server returns "
            "log-probabilities only: set view_scorer='local'"
        )


def _body(ids: tuple[int, ...]) -> dict[str, Any]:
    # 0: of each place only the token itself. Temperature and max_tokens are those of the token that has to be sampled.
    return {"prompt": list(ids), "prompt_logprobs": 0, "max_tokens": 1, "temperature": 1.0}
