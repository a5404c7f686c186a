"""The interface of a teacher, the student itself as one, and what moving averages have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from unisd.modules import evaluating
from unisd.partitions import is_partitioned
from unisd.sharding import copy_of, local, reshard, shape_of
from unisd_kernels import LMHead, ema_update_


class Teacher(ABC):
    """A teacher as the trainer sees it.

    Attributes:
        mode: name, as in `UniSDConfig.ema` (or "self", "base").
    """

    mode: ClassVar[str]

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the module that scores, in eval mode, under `torch.no_grad()`; restore the student on the way out.

        Args:
            model: the student, unwrapped.
        """
        with ExitStack() as stack:
            self.follow(model)
            # Autocast caches 16-bit copies of the weights by parameter. A copy made here, from swapped weights
            # and without a graph, must not be served to the student's forward pass.
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(torch.no_grad())
            scorer = stack.enter_context(self._weights(model))
            stack.enter_context(evaluating(scorer))
            yield scorer

    def version(self, model: nn.Module) -> Hashable:
        """Something that is equal at two moments only if the weights that score are: what was computed with them may
        be used again. Outside of `scoring`.

        Writing into `parameter.data` leaves no trace in a tensor, so whoever does that calls `weights_moved`, as the
        trainer does at every optimizer step.
        """
        return (self._moves, *marks(model.parameters()))

    _moves = 0

    def weights_moved(self) -> None:
        """Say that the student's weights are others now."""
        self._moves += 1

    def start(self, model: nn.Module) -> None:  # noqa: B027 (nothing to do for a teacher without weights)
        """Take the weights to start from. Whole ones are taken when the teacher is made; those that are sharded later
        when they are, before a checkpoint is loaded."""

    def follow(self, model: nn.Module) -> None:  # noqa: B027 (nothing to do for a teacher without weights)
        """Go where the student is: a model may be moved, or cast, after its teacher was made (DeepSpeed,
        `bf16_full_eval`, `device_map`). Before each use; costs a comparison per tensor."""

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the module with the teacher's weights in place."""
        yield model

    def head(self, model: nn.Module) -> LMHead | None:
        """The teacher's own head, frozen, or None if it is the student's. Only valid inside `scoring`, but what it
        returns stays valid after it."""
        return None


class SelfTeacher(Teacher):
    """The student's current weights: the richer context is all that makes it a teacher."""

    mode = "self"


class EMATeacher(Teacher):
    """A moving average: `theta_t = decay theta_t + (1 - decay) theta_s` at each `update`, starting at the student.

    Float32 whatever the student's dtype: a 16-bit average with decay 0.98 stops moving once the increment is below half
    an ulp. Where the weights lie in shards so does the average, and each process moves what it holds.

    Attributes:
        decay: weight of the old average.
        updates: number of updates so far.
        shapes: of the weights whose average lies flat, by name (ZeRO-3).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def version(self, model: nn.Module) -> Hashable:
        # Of the student only what the average does not replace; the average itself is a part of a resumed run.
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        return (self._loads, self.updates, *marks(self.tensors().values()), *marks(frozen))

    _loads = 0

    def update(self, model: nn.Module) -> None:
        """Move the average towards the student's weights, once."""
        self.follow(model)
        reshard(model)
        self._update(model)
        self.updates += 1

    @abstractmethod
    def _update(self, model: nn.Module) -> None: ...

    def _average(self, averages: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor]) -> None:
        """Move the averages towards the student's tensors of the same names, in one call, shard by shard."""
        targets = [local(average) for average in averages.values()]
        ema_update_(targets, [local(student[name]) for name in averages], self.decay)

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by name, float32, live (not copies)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint has to hold: `mode`, `updates` and copies of the averages in `tensors`."""
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors().items()}
        return {"mode": self.mode, "updates": self.updates, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit.

        Raises:
            ValueError: a state of another mode, or of another model.
        """
        saved = state["tensors"]
        self.check_fits(state["mode"], {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in saved.items()})
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(saved[name])
        self.loaded(int(state["updates"]))

    def check_fits(self, mode: str, saved: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Raise ValueError for a saved average of another mode, or of another model.

        Args:
            saved: dtype and shape of each tensor by name.
        """
        if mode != self.mode:
            raise ValueError(
                f"the saved teacher is ema={mode!r} but this run has ema={self.mode!r}; resume with the mode of the "
                "checkpoint"
            )
        own = self.tensors()
        if own.keys() != saved.keys():
            difference = sorted(own.keys() ^ saved.keys())
            raise ValueError(
                f"the saved teacher belongs to another model or adapter: {len(difference)} names differ, the first is "
                f"{difference[0]!r}"
            )
        for name, tensor in own.items():
            dtype, shape = saved[name]
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise ValueError(
                    f"{name!r} of the saved teacher is {dtype} {shape}, expected {tensor.dtype} {tuple(tensor.shape)}"
                )

    def loaded(self, updates: int) -> None:
        """Say that the averages in `tensors` are those of a checkpoint now, made of so many updates."""
        self.updates = updates
        self._loads += 1
        self._after_load()

    def _after_load(self) -> None:
        """Bring what is derived from the averages up to date."""


def marks(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Where tensors are and how often they were written to in place."""
    return [(held.data_ptr(), held._version) for held in map(local, tensors)]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_bare_name(name): parameter for name, parameter in model.named_parameters()}


def _bare_name(name: str) -> str:
    # Wrappers of torch.compile and of activation checkpointing are in the names; an average must not depend on them.
    return name.removeprefix("_orig_mod.").replace("_checkpoint_wrapped_module.", "")


def flat_shapes(parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of those parameters of which `wide` makes a flat copy."""
    return {name: shape_of(parameter) for name, parameter in parameters.items() if is_partitioned(parameter)}


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 (float64 for float64) copy, in shards where the tensor is."""
    return copy_of(tensor, torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def move(averages: dict[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> None:
    """Move each average to the device of the tensor of its name, in its own dtype."""
    for name, average in averages.items():
        if average.device != like[name].device:
            averages[name] = average.to(like[name].device)
