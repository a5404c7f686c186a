"""Importance weights where the sampler's distribution is not quite the student's: other precision, other kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from unisd.batch import SAMPLER_LOGPROBS
from unisd_kernels.config import check_number

if TYPE_CHECKING:
    from unisd.config import UniSDConfig


def check_importance(args: UniSDConfig) -> None:
    """Raise ValueError or TypeError for settings of the correction that are out of range or do not go with others."""
    check_number("vllm_importance_sampling_clip_max", args.vllm_importance_sampling_clip_max, low=0.0, open_low=True)
    if not args.vllm_importance_sampling_correction:
        return
    if not args.use_vllm:
        raise ValueError(
            "vllm_importance_sampling_correction=True has no effect without use_vllm: it corrects rollouts by vLLM"
        )
    if args.batch_statistics == "global" and args.divides_by_weight_total:
        raise ValueError(
            "vllm_importance_sampling_correction=True gives weights that the sum of weights of "
            "batch_statistics='global' does not know; set weight_normalization='count', or batch_statistics='micro'"
        )


def prefix_weights(student: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, cap: float) -> torch.Tensor:
    """Weights of the positions of completions that were drawn from q and are to stand for samples of p.

        w_n = min( prod_{m < n} p(y_m | y_<m) / q(y_m | y_<m), cap )

    The divergence at a place is over the whole vocabulary and depends on the tokens before it alone. So what corrects
    it is the ratio of the tokens before it; that of the sampled token itself, which is what policy gradients are
    weighted by, has the mean 1 whatever they are and would add noise. Without the cap the sum over the places is
    unbiased: E_q[sum_n w_n D_n] = E_p[sum_n D_n]. Computed in float64.

    Args:
        student, sampler: [B, T] log-probabilities of the sampled tokens under p and q, at the temperature of sampling.
        mask: [B, T], 1 where a token was sampled; others (of a tool, padding) have the ratio 1.
        cap: bound on a weight.

    Returns:
        [B, T] float32, no gradient.
    """
    ratio = (student.detach().double() - sampler.double()).masked_fill(mask == 0, 0.0)
    before = ratio.cumsum(1) - ratio
    return before.exp().clamp(max=cap).float()


class SamplerLogprobs:
    """Log-probabilities of one rollout of TRL's vLLM sampler, which TRL's distillation does not ask for."""

    def __init__(self) -> None:
        self._rows: list[list[float]] | None = None

    @contextmanager
    def recording(self, sampler: Any, active: bool) -> Iterator[None]:
        """Ask `sampler` for them and keep them, meanwhile.

        Args:
            sampler: a `trl.generation.vllm_generation.VLLMGeneration`.
            active: whether to do anything.
        """
        self._rows = None
        if not active:
            yield
            return
        generate, asked = sampler.generate, sampler.logprobs

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = generate(*args, **kwargs)
            # Of each place the sampled token alone; None is TRL's for NaN.
            self._rows = [[torch.nan if of is None else of for (of,) in row] for row in output[2]]
            return output

        sampler.generate, sampler.logprobs = recorded, 0
        try:
            yield
        finally:
            sampler.generate, sampler.logprobs = generate, asked

    def put(self, output: dict[str, Any]) -> None:
        """Add `SAMPLER_LOGPROBS` to a rollout, if they were recorded.

        Raises:
            ValueError: completions that are not what the sampler wrote alone (tools).
        """
        if self._rows is None:
            return
        mask = output["completion_mask"]
        values = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        for place, (row, length) in enumerate(zip(self._rows, mask.sum(1).tolist(), strict=True)):
            if len(row) not in (length, 0):  # 0: a token stands in for an empty completion
                raise ValueError(
                    f"vllm_importance_sampling_correction: the sampler scored {len(row)} tokens of a completion of "
                    f"{length}; it cannot be used with tools"
                )
            values[place, : len(row)] = torch.tensor(row, dtype=torch.float32)
        output[SAMPLER_LOGPROBS] = values
