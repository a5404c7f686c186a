"""Decoding from the model's own distribution, whatever its generation config says.

`model.generate` fills every setting that its caller leaves open from `model.generation_config`: penalties, forbidden,
forced and suppressed tokens, minimum lengths, biases, truncations, watermarks, beams. A greedy reply is then no longer
the argmax, and a rollout no longer a sample of the distribution that the loss scores. Many of these settings have None
as their neutral value, which `generate` reads as "left open", so they cannot be switched off by an argument: the
model's config itself is put aside while it generates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from unisd.modules import is_peft

# The ids say where a text begins and ends, the cache settings how a pass is computed; all else changes what comes out.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "cache_implementation", "cache_config", "disable_compile")


@contextmanager
def own_distribution(model: Any) -> Iterator[None]:
    """Make `model.generate` take nothing but token ids and cache settings from the model's config, meanwhile.

    Args:
        model: has `generate` and a `generation_config`; PEFT or not. Its config is put back on the way out.
    """
    owners = [model, model.get_base_model()] if is_peft(model) else [model]
    # A PEFT model may hold a config of its own, which `generate` hands to its base, or read its base's.
    before = [(owner, owner.__dict__.get("generation_config")) for owner in owners]
    plain = neutral_config(model.generation_config)
    try:
        for owner, config in before:
            if config is not None or owner is owners[-1]:
                owner.generation_config = plain
        yield
    finally:
        for owner, config in before:
            if config is not None:
                owner.generation_config = config
            else:
                owner.__dict__.pop("generation_config", None)


def neutral_config(config: Any) -> GenerationConfig:
    """A config with the token ids and cache settings of `config` and nothing else set.

    Args:
        config: a `GenerationConfig`, or None.
    """
    kept = {name: getattr(config, name, None) for name in _KEPT}
    return GenerationConfig(**{name: value for name, value in kept.items() if value is not None})


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a reply, those of the model's generation config and the tokenizer's EOS, as in a rollout."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if declared is None else [declared] if isinstance(declared, int) else [int(token) for token in declared]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids
