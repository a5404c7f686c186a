"""How the rollouts of a trainer are sampled: one context for all that has to hold meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unisd.generation.decoding import own_distribution
from unisd.generation.greedy import greedy_rollouts
from unisd.generation.merged import merged_adapters


@contextmanager
def rollout_sampling(trainer: Any) -> Iterator[None]:
    """Sample from the model's own distribution, meanwhile, and greedily in evaluations, which can then be compared.

    The loss scores samples of that distribution (under the settings of the run), so nothing of the model's generation
    config may bend them.

    Args:
        trainer: a `UniSDTrainer`.
    """
    student = trainer.accelerator.unwrap_model(trainer.model)
    with (
        own_distribution(student),
        greedy_rollouts(trainer, trainer._mode == "eval"),
        merged_adapters(student, trainer._merges),
        trainer._sampler.recording(
            getattr(trainer, "vllm_generation", None),
            trainer.args.vllm_importance_sampling_correction and trainer._mode == "train",
        ),
    ):
        yield
