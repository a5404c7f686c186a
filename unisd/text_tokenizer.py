"""The tokenizer of a model that is trained on text alone, also where the model comes with a processor of images."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import get_config_model_id


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding and truncating on the left as rollouts need it.

    Of a multimodal model (Gemma 3 from 4B on) that is the tokenizer inside its processor.
    """
    return AutoTokenizer.from_pretrained(
        name_or_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        padding_side="left",
        truncation_side="left",
    )


def tokenizer_for(model: Any, processing_class: Any, args: Any) -> PreTrainedTokenizerBase:
    """`processing_class` itself, the tokenizer inside it, or, if it is None, the model's own.

    Args:
        model: a model, or the name of one.
        args: the `UniSDConfig`, for the revision and `trust_remote_code` of what is loaded.

    Raises:
        TypeError: neither a tokenizer nor a processor with one.
        ValueError: None, and a model built in Python, which has no name to load a tokenizer by.
    """
    if processing_class is None:
        by_name = isinstance(model, str)
        name = model if by_name else get_config_model_id(model.config)
        if not name:
            raise ValueError("processing_class is None and the model has no name to load its tokenizer by: pass one")
        revision = (args.model_init_kwargs or {}).get("revision") if by_name else None
        return load_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)
    inner = getattr(processing_class, "tokenizer", None) if isinstance(processing_class, ProcessorMixin) else None
    tokenizer = processing_class if inner is None else inner
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer or a processor that holds one, got {type(processing_class).__name__}"
        )
    return tokenizer
