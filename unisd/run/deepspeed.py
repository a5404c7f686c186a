"""DeepSpeed without an accelerator, over gloo, to rehearse a run; on how many processes its checkpoints resume."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import patch_environment

if TYPE_CHECKING:
    from transformers import TrainingArguments

    _Base = TrainingArguments
else:
    _Base = object


def check_processes(checkpoint: str, processes: int, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a checkpoint of DeepSpeed that another number of processes wrote, which it cannot read
    unless it is a universal one.

    Args:
        config: of DeepSpeed.
    """
    written = len(list(Path(checkpoint).glob("global_step*/*zero_pp_rank_*_mp_rank_00_optim_states.pt")))
    if written in (0, processes) or (config.get("checkpoint") or {}).get("load_universal"):
        return
    raise ValueError(
        f"{checkpoint} was written by {written} processes, and DeepSpeed resumes it on as many, not on {processes}: "
        f"start {written}, or make a universal checkpoint of it (docs/distributed.md)"
    )


def separate_steps(engine: Any) -> None:
    """Give each group of weights its own count of steps. Of a universal checkpoint DeepSpeed 0.19 gives all of them one
    tensor, which Adam then moves once a group, so that its bias correction is of other steps."""
    optimizer = getattr(engine, "basic_optimizer", None)
    for state in getattr(optimizer, "state", {}).values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


class StartsDeepSpeed(_Base):
    """Settings of a trainer that start DeepSpeed with `use_cpu=True` too; stands before the class of `transformers`.

    Accelerate starts it only where it is not told of the processor, and else would run DDP without a word. Untold, and
    without an accelerator, it starts DeepSpeed over the backend that it is given, on the processor.
    """

    @cached_property
    def _setup_devices(self) -> torch.device:  # type: ignore[override]
        asked = bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if not (self.use_cpu and asked and "LOCAL_RANK" in os.environ):
            return super()._setup_devices
        if torch.accelerator.is_available():
            raise ValueError(
                "use_cpu=True does not keep DeepSpeed from the accelerator of this machine: hide that "
                "(CUDA_VISIBLE_DEVICES=), or leave use_cpu out"
            )
        told: dict[str, Any] = {"use_cpu": self.use_cpu, "deepspeed": self.deepspeed, "ddp_backend": self.ddp_backend}
        self.use_cpu, self.deepspeed, self.ddp_backend = False, None, "gloo"
        try:
            with patch_environment(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_CPU="false"):
                return super()._setup_devices
        finally:
            for name, value in told.items():
                setattr(self, name, value)
