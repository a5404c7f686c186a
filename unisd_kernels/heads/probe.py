"""Run a model's own forward on a few tokens: pairs of hidden states of its backbone and the logits it makes of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from unisd_kernels.heads.causal_model import (
    backbone,
    causal_model,
    evaluating,
    head_module,
    input_embedding,
    text_config,
)

if TYPE_CHECKING:
    from unisd_kernels.heads.head import LMHead

NUM_TOKENS = 8
# Standard deviation of the logits in the two halves of the made-up rows: an ordinary one, and one that reaches far
# into any soft cap in use (15 to 50), which a model's own states may be far below, at the start of training above all.
_LOGIT_STD = (3.0, 60.0)
# A backbone given the same tokens twice repeats itself up to rounding; given something else, it does not.
_SAME_HIDDEN = 0.05


@dataclass(frozen=True)
class Probe:
    """Rows of hidden states and what the model's own forward makes of them, on the device of the head.

    Attributes:
        hidden: [2 T, H], what the backbone gives for T tokens, then T made-up states with large logits; or [T, H]
            where the model's forward does not go through its backbone and only its own states can be seen.
        logits: [2 T, V] or [T, V], the model's own.
        num_natural: T.
        head_input: [T, H'] what enters the output head for the tokens; None if its forward is not called.
        autocast: dtype of autocast inside the model's forward, or None.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    num_natural: int
    head_input: torch.Tensor | None
    autocast: torch.dtype | None


def probe(model: Any, head: LMHead) -> Probe:
    """Two passes of the model and one of its backbone over `NUM_TOKENS` tokens, in eval mode and without gradients.
    Training mode, random number generators and caches are left as they were.

    Args:
        head: its output head, or this rank's slice of it.

    Raises:
        ValueError: the model cannot be run on token ids alone, or its backbone is not what its forward runs.
    """
    causal = causal_model(model)
    name = type(causal).__name__
    decoder = backbone(model)
    weight = head.weight
    ids = _token_ids(causal, head)
    length = _row_length(head, name)
    seen = _Seen()
    # A model that fails on plain token ids may do so in any way; what it says is passed on.
    try:
        with torch.no_grad(), evaluating(causal):
            logits = _run(causal, ids, seen.hooks(decoder, head_module(model)), _logits_of)
            hidden = _run(decoder, ids, seen.same_autocast(ids.device), _hidden_of)
            own = hidden if seen.hidden is None else seen.hidden
            made_up = None
            if seen.hidden is not None:
                made_up = _made_up_states(own, length)
                far = _run(causal, ids, _replacing(decoder, made_up), _logits_of)
                logits, made_up = torch.cat([logits, far]), made_up.flatten(0, -2)
    except Exception as error:
        raise ValueError(
            f"the head of {name} cannot be checked, because its forward on {NUM_TOKENS} token ids failed: "
            f"{type(error).__name__}: {_first_line(error)}. If you know its scale and cap, build LMHead(weight, bias, "
            "logit_scale, softcap) yourself; verify=False believes the configuration"
        ) from error
    own, hidden = own.flatten(0, -2), hidden.flatten(0, -2)
    rows = own if made_up is None else torch.cat([own, made_up.to(own)])
    if logits.shape[0] != rows.shape[0] or own.shape != hidden.shape or own.shape[1] != weight.shape[1]:
        raise ValueError(
            f"the head of {name} cannot be checked: {NUM_TOKENS} tokens give hidden states {tuple(hidden.shape)} and "
            f"{logits.shape[0] * NUM_TOKENS // rows.shape[0]} rows of logits, the head's weight is "
            f"{tuple(weight.shape)}"
        )
    difference = (hidden.double().cpu() - own.double().cpu()).norm(dim=1) / own.double().cpu().norm(dim=1)
    if not difference.median() <= _SAME_HIDDEN and bool(own.any()):
        raise ValueError(
            f"{name} does not run its backbone ({type(decoder).__name__}) on the token ids as they are: alone it gives "
            f"other hidden states (by {float(difference.median()):.2g} of their length), so no head fits them"
        )
    entered = seen.head_input
    return Probe(
        rows.to(weight.device),
        logits.to(weight.device),
        own.shape[0],
        None if entered is None else entered.flatten(0, -2).to(weight.device),
        seen.autocast,
    )


class _Seen:
    """Tensors that hooks see in one forward pass."""

    def __init__(self) -> None:
        self.hidden: torch.Tensor | None = None
        self.head_input: torch.Tensor | None = None
        self.autocast: torch.dtype | None = None

    @contextmanager
    def hooks(self, decoder: Any, head: Any) -> Iterator[None]:
        def after_decoder(module: Any, args: Any, output: Any) -> None:
            self.hidden = _hidden_of(output).detach().clone()
            device = self.hidden.device.type
            self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def before_head(module: Any, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                self.head_input = args[0].detach().clone()

        with ExitStack() as stack:
            stack.callback(decoder.register_forward_hook(after_decoder).remove)
            stack.callback(head.register_forward_pre_hook(before_head).remove)
            yield

    @contextmanager
    def same_autocast(self, device: torch.device) -> Iterator[None]:
        """Accelerate puts autocast into the model's forward, which a call of the backbone alone passes by."""
        if self.hidden is None:
            device_type = device.type
            self.autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
            yield
            return
        with torch.autocast(self.hidden.device.type, self.autocast, enabled=self.autocast is not None):
            yield


@contextmanager
def _replacing(decoder: Any, states: torch.Tensor) -> Iterator[None]:
    """The decoder's last hidden state is `states`, whatever it reads."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return states
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output

    with ExitStack() as stack:
        stack.callback(decoder.register_forward_hook(hook).remove)
        yield


def _run(module: Any, ids: torch.Tensor, context: Any, read: Any) -> torch.Tensor:
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # As the trainer and generation call it: with a mask, without a cache.
    arguments = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    given = {name: value for name, value in arguments.items() if takes_any or name in parameters}
    with _kept_generators(module), context:
        return read(module(input_ids=ids, **given))


@contextmanager
def _kept_generators(module: Any) -> Iterator[None]:
    """Restores the generators; each pass then also draws the same numbers (Reformer hashes at random)."""
    devices: dict[str, set[int]] = {}
    for parameter in module.parameters():
        if parameter.device.type not in ("cpu", "meta"):
            devices.setdefault(parameter.device.type, set()).add(parameter.device.index or 0)
    with ExitStack() as stack:
        if not devices:
            stack.enter_context(torch.random.fork_rng(devices=[]))
        for device_type, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=device_type))
        yield


def _token_ids(causal: Any, head: LMHead) -> torch.Tensor:
    """[1, NUM_TOKENS] ordinary tokens, spread over the vocabulary: an image or a padding token is treated specially."""
    embedding = input_embedding(causal)
    table = getattr(embedding, "weight", None)
    sizes = [head.num_rows, getattr(text_config(causal), "vocab_size", None)]
    device = head.weight.device
    if isinstance(table, torch.Tensor):
        sizes.append(table.shape[0])
        device = torch.device("cpu") if table.device.type == "meta" else table.device
    size = min(size for size in sizes if isinstance(size, int) and size > 0)
    special = _special_ids(causal.config) | _special_ids(text_config(causal))
    ordinary = [token for token in range(min(size, 1 << 20)) if token not in special] or list(range(size))
    step = max(1, len(ordinary) // NUM_TOKENS)
    # From the middle of each part: a padding row of the embedding may lie at either end without being named.
    chosen = [ordinary[(index * step + step // 2) % len(ordinary)] for index in range(NUM_TOKENS)]
    return torch.tensor([chosen], dtype=torch.long, device=device)


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    for name, value in values.items():
        if not name.endswith(("token_id", "token_index", "token_ids")):
            continue
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(token, int):
                found.add(token)
    return found


def _row_length(head: LMHead, name: str) -> float:
    """Root mean square of the norms of the weight's rows, on all ranks."""
    # The norm of a 16-bit weight does not fit 16 bits.
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(head.weight.detach(), dtype=dtype)
    if head.shard is not None:
        square = norm.square()
        head.shard.all_reduce(square)
        norm = square.sqrt()
    length = float(norm) / math.sqrt(head.num_rows)
    if length == 0.0 or not math.isfinite(length):
        what = "zero, and no scale shows in it" if length == 0.0 else "not finite"
        raise ValueError(f"the head of {name} cannot be checked: its weight is {what}")
    return length


def _made_up_states(hidden: torch.Tensor, length: float) -> torch.Tensor:
    """Normal random states of the shape of `hidden`, scaled so that half the rows have ordinary logits and half large
    ones: a logit of a state with independent entries has the variance of a weight's row."""
    generator = torch.Generator().manual_seed(0)
    count, size = hidden.shape[-2], hidden.shape[-1]
    states = torch.randn(count, size, generator=generator, dtype=torch.float64)
    wanted = torch.tensor(_LOGIT_STD, dtype=torch.float64).repeat_interleave((count + 1) // 2)[:count]
    return (states * (wanted / length).unsqueeze(1)).to(hidden).expand(hidden.shape)


def _hidden_of(output: Any) -> torch.Tensor:
    state = getattr(output, "last_hidden_state", None)
    if state is None:
        state = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(state, torch.Tensor):
        raise TypeError(f"the backbone gives no last_hidden_state, but {type(output).__name__}")
    return state


def _logits_of(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) else output
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"the model gives no logits, but {type(output).__name__}")
    return logits.flatten(0, -2)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0]
