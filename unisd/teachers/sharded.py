"""Teachers of a model whose weights are all trained and lie in shards (FSDP2).

A second model, as `unisd.teachers.full` keeps one, would have to be sharded and gathered beside the first. Here the
shards of the teacher's weights take the place of the student's while it scores (`unisd.teachers.swap`): nothing is
gathered that the student's own pass does not gather, and weights that are not trained exist once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from unisd.sharding import copy_of, reshard
from unisd.teachers.base import Teacher, marks, trained_parameters
from unisd.teachers.full import refuse_peft
from unisd.teachers.swap import SwappedEMATeacher, swapped, swapped_head
from unisd_kernels import LMHead


class ShardedEMATeacher(SwappedEMATeacher):
    """Full fine-tuning: the average of each weight lies in shards like the weight."""

    mode = "full"

    def __init__(self, model: nn.Module, decay: float, *, start: bool = True) -> None:
        refuse_peft(model)
        super().__init__(model, decay, start=start)


class ShardedBaseTeacher(Teacher):
    """Full fine-tuning: the weights before training, of the model the trainer is built with, also on resume."""

    mode = "base"

    def __init__(self) -> None:
        self._weights_before: dict[str, torch.Tensor] = {}

    def start(self, model: nn.Module) -> None:
        reshard(model)
        trained = trained_parameters(model)
        self._weights_before = {name: copy_of(parameter, parameter.dtype) for name, parameter in trained.items()}

    def version(self, model: nn.Module) -> Hashable:
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        return (*marks(self._weights_before.values()), *marks(frozen))

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        with swapped(model, self._weights_before):
            yield model

    def head(self, model: nn.Module) -> LMHead | None:
        return swapped_head(model)
