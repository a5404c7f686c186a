"""The views of `unisd_loss` with `views_dtype="int8"`: which it takes, and their agreement weights."""

from __future__ import annotations

import torch

from unisd_kernels.backends import extension
from unisd_kernels.backends.engine import Engine
from unisd_kernels.backends.projection import Projection
from unisd_kernels.certified.agreement import CertifiedAgreement, certified_agreement
from unisd_kernels.certified.int8_head import ready_head
from unisd_kernels.config import LossConfig, LossInputs
from unisd_kernels.dtypes import statistics_dtype

_INSTEAD = "leave views_dtype out"


def check_views(inputs: LossInputs, config: LossConfig, implementation: str, has_group: bool = False) -> None:
    """Raise where int8 scores of the views are asked for and cannot be had.

    Args:
        has_group: other ranks hold rows of the batch.

    Raises:
        ValueError: saying why, and what to do.
    """
    if config.views_dtype is None or not inputs.auxiliary_hidden:
        return
    asked = f"views_dtype={config.views_dtype!r}"
    if implementation != "native":
        raise ValueError(f"{asked} needs the C++ backend on a CPU, got impl {implementation!r}: {_INSTEAD}")
    if not extension.cpu_multiplies_int8():
        raise ValueError(f"{asked} needs a processor with AVX512_VNNI, got {extension.cpu_isa()!r}: {_INSTEAD}")
    if has_group:
        raise ValueError(f"{asked} knows the rows of one rank, got row_group or sequence_group: {_INSTEAD}")
    if inputs.heads[2].group is not None:
        raise ValueError(f"{asked} needs the views' whole head, got a slice of its vocabulary: {_INSTEAD}")
    check_frozen(inputs, config)


def check_frozen(inputs: LossInputs, config: LossConfig) -> None:
    """Raise where the views' head is trained: its codes would have to be made anew at every step.

    Raises:
        ValueError: it is, and int8 scores are asked for.
    """
    if config.views_dtype is not None and inputs.auxiliary_hidden and inputs.heads[2].weight.requires_grad:
        raise ValueError(
            f"views_dtype={config.views_dtype!r} needs a frozen head for the views, got a weight that requires a "
            f"gradient: detach it if it stays as it is, else {_INSTEAD}"
        )


def views_agreement(inputs: LossInputs, config: LossConfig, engine: Engine) -> CertifiedAgreement:
    """Agreement weights, each within `config.views_tolerance` of that from exact scores."""
    views, head, target_ids = inputs.auxiliary_hidden, inputs.heads[2], inputs.target_ids.long()
    assert config.views_tolerance is not None
    if not inputs.num_rows:
        nothing = torch.empty(len(views), 0, dtype=statistics_dtype(views[0].dtype))
        size = 0 if config.agreement == "token" else inputs.num_sequences
        return CertifiedAgreement(nothing, nothing.new_empty(0), nothing.new_zeros(size), nothing[0].bool())

    def score(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return engine.score(Projection.of(hidden, head, 1.0), ids).logprobs

    return certified_agreement(
        views,
        ready_head(head, torch.cat(views)),
        target_ids,
        inputs.cu_seqlens,
        score=score,
        tolerance=config.views_tolerance,
        level=config.agreement,
        statistic=config.agreement_statistic,
        gamma=config.agreement_gamma,
        impl="native",
    )
