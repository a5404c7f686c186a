"""A generator by what the user says: `transformers`, `vllm`, or the URL of a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unisd.generation.interface import Generator


def make_generator(
    kind: str,
    model: str,
    *,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    loaded: Any = None,
    trust_remote_code: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Generator:
    """The generator that `kind` means.

    Args:
        kind: "transformers", "vllm", or a URL that begins with http:// or https://.
        model: as in `unisd.load_model`; of a server, the name there, or "" for the only one.
        batch_size: None for the kind's own.
        device: for "transformers": on the CPU float32 weights, elsewhere those of the checkpoint.
        loaded: `(model, tokenizer)` that are loaded already, for "transformers".
        trust_remote_code: run code that comes with the model.
        options: further arguments of `vllm.LLM`, for "vllm" alone.

    Raises:
        ValueError: another kind, one that is not there, or options of another one.
    """
    if options and kind != "vllm":
        raise ValueError(f"generator_options are of the generator vllm, and the generator is {kind}: leave them out")
    size: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    if kind.startswith(("http://", "https://")):
        from unisd.generation.server import ServerGenerator

        return ServerGenerator(kind, model or None, **({} if batch_size is None else {"concurrency": batch_size}))
    if kind == "vllm":
        from unisd.generation.vllm import VLLMGenerator
        from unisd.models import resolve_model

        return VLLMGenerator(resolve_model(model), **size, trust_remote_code=trust_remote_code, **(options or {}))
    if kind == "transformers":
        from unisd.generation.transformers import TransformersGenerator
        from unisd.models import load_model

        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        loaded = loaded or load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return TransformersGenerator(*loaded, **size)
    raise ValueError(f"the generator must be transformers, vllm or a URL (http://...), got {kind!r}")
