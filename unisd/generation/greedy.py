"""Greedy rollouts of a trainer, for evaluations that can be compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_DRAWN = ("temperature", "top_p", "top_k", "min_p")


@contextmanager
def greedy_rollouts(trainer: Any, active: bool) -> Iterator[None]:
    """Make TRL's rollouts take the most probable token, meanwhile.

    Args:
        trainer: of TRL, with `generation_config`, and `vllm_generation` where vLLM samples.
        active: whether to do anything.
    """
    if not active:
        yield
        return
    config, kwargs = trainer.generation_config, trainer.generation_kwargs
    trainer.generation_config = copy.deepcopy(config)
    trainer.generation_config.do_sample = False
    for name in _DRAWN:
        setattr(trainer.generation_config, name, None)
    trainer.generation_kwargs = {**{k: v for k, v in kwargs.items() if k not in _DRAWN}, "do_sample": False}
    sampler = getattr(trainer, "vllm_generation", None)
    temperature = getattr(sampler, "temperature", None)
    if sampler is not None:
        sampler.temperature = 0.0
    try:
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = config, kwargs
        if sampler is not None:
            sampler.temperature = temperature
