"""What a run of several processes needs of its trainer: the engine that was asked for, shards to start from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from unisd.drift import DriftProbe
from unisd.partitions import remember_engine
from unisd.run.checkpointed import CheckpointedTrainer
from unisd.run.deepspeed import check_processes, separate_steps
from unisd.sharding import is_sharded
from unisd.teachers import EMATeacher, Teacher, is_sharded_average, load_teacher, save_teacher

if TYPE_CHECKING:
    from trl import DistillationTrainer

    class _Base(CheckpointedTrainer, DistillationTrainer): ...

else:
    _Base = CheckpointedTrainer

_T = TypeVar("_T")


class DistributedTrainer(_Base):
    """Base of the trainer that knows engines (DDP, FSDP2, ZeRO); stands before TRL's class.

    Weights that an engine shards are whole, or not even loaded, when the trainer is made, and shards when training
    begins. Teacher and drift probe take what they start from then, before a checkpoint is loaded.

    Attributes:
        teacher: the model under the teacher's weights.
        drift: the drift's probe, or None.
    """

    teacher: Teacher
    drift: DriftProbe | None
    _has_started = False

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        _fsdp_on_cpu(self)

    @property
    def _is_sharded(self) -> bool:
        return self._dist.is_fsdp or self._dist.is_zero3

    def run_on_student(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call `function(student, ...)` outside of a training step: under autocast, with whole weights."""
        student = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            if not self._is_sharded:
                return function(student, *args, **kwargs)
            # Through the wrapper's forward, which materializes the shards. Hooks of an engine look into what that
            # returns, and DeepSpeed's take no number, so it returns a tensor and the result goes beside it.
            results: list[_T] = []

            def call(*given: Any, **named: Any) -> torch.Tensor:
                results.append(function(*given, **named))
                return torch.zeros(())

            self._forward_redirection(self.model_wrapped, student, call, student, *args, **kwargs)
            return results[0]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        # What is called between the sharding of the weights and the loading of a checkpoint.
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        student: nn.Module = self.accelerator.unwrap_model(self.model)
        self._remember_engine(self.model)
        if not self._has_started and is_sharded(student):
            self._has_started = True
            self.teacher.start(student)
            if self.drift is not None and self.drift.loses_base(student):
                self.run_on_student(self.drift.capture)
        return scheduler

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._remember_engine(model)  # of an evaluation without training
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _remember_engine(self, model: Any) -> None:
        """Tell the weights' parts of the engine of ZeRO-3, and TRL's redirection of a forward pass too: it asks for the
        wrapped model, which `transformers` sets only after it has made the scheduler."""
        if self._dist.is_zero3:
            self.model_wrapped = self.accelerator.deepspeed_engine_wrapped.engine
            remember_engine(self.accelerator.unwrap_model(model), self.model_wrapped)

    @property
    def _deepspeed_config(self) -> dict[str, Any] | None:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return None if plugin is None else plugin.deepspeed_config

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        # Of the finished run there is to be a model that `from_pretrained` reads: gathered weight by weight into the
        # first process' memory (not its accelerator's), as transformers does.
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 2:
            yield
            return
        before = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type(before)

    def check_resumable(self, checkpoint: str) -> None:
        if self._deepspeed_config is not None:
            check_processes(checkpoint, self.accelerator.num_processes, self._deepspeed_config)

    def write_beside(self, folder: str) -> None:
        if not isinstance(self.teacher, EMATeacher):
            return
        if self.args.should_save or is_sharded_average(self.teacher):
            save_teacher(self.teacher, folder, self.state.global_step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The one hook that every kind of resume passes (DeepSpeed and FSDP load their weights elsewhere), after the
        # trainer state is known and before the first step.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._deepspeed_config is not None:
            separate_steps(self.accelerator.deepspeed_engine_wrapped.engine)
        if checkpoint is not None and isinstance(self.teacher, EMATeacher):
            load_teacher(self.teacher, checkpoint, self.state.global_step)


def _fsdp_on_cpu(trainer: Any) -> None:
    """Start FSDP2 on CPUs where it was asked for. Accelerate does so on accelerators only, and on CPUs would run DDP
    without a word; torch's FSDP2 runs there over gloo, which makes a rehearsal of a run possible."""
    accelerator, plugin = trainer.accelerator, None
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    if trainer.args.fsdp_plugin_args is not None:
        plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        plugin = FullyShardedDataParallelPlugin()
    if plugin is None:
        return
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
