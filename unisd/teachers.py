"""The teacher's weights: the student's own, those from before training, or a moving average of the student's.

A teacher scores every view (teacher, auxiliary and negative contexts). `Teacher.scoring(model)` yields the module to
run, in eval mode and without gradients, and puts everything back when it is left, by an exception too. Teachers that
borrow the student's module (all but the copies) must run before the student's forward pass: its autograd graph
would refer to weights that are swapped underneath it.

| teacher | weights | memory besides the student |
|---|---|---|
| `SelfTeacher` | the student's, now | none |
| `BaseTeacher` | before training | LoRA: none (adapter off); full fine-tuning: a copy of the trained weights |
| `FullEMATeacher` | float32 average of all trained weights | a copy of them, and 4 bytes each for a 16-bit student |
| `AdapterEMATeacher` | float32 averages of A and of B | 4 bytes a trained weight |
| `MergedEMATeacher` | float32 average of the product scaling B A | 4 bytes an entry of each adapted weight |

Averages are float32 whatever the student's dtype: a 16-bit average with decay 0.98 stops moving once the increment is
below half an ulp.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from trl.trainer.utils import maybe_gather_lm_head_ctx

from unisd.modules import evaluating, is_peft, model_head
from unisd_kernels import LMHead, ema_update_

STATE_FILE = "unisd_ema_teacher.safetensors"
"""File of a checkpoint that holds the moving average."""


class Teacher(ABC):
    """What the trainer needs to know about a teacher.

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


class BaseTeacher(Teacher):
    """The weights before training: the adapter switched off, or for full fine-tuning a frozen copy of the model.

    The copy is taken from the model the trainer is built with, also on resume: build it with the original model.
    """

    mode = "base"

    def __init__(self, model: nn.Module) -> None:
        self._copy = None if is_peft(model) else _frozen_copy(model)
        # Asked now: while the adapter is off, nothing is trained.
        self._head_is_trained = head_is_trained(model)

    def follow(self, model: nn.Module) -> None:
        if self._copy is not None:
            _match(self._copy, model)

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        if self._copy is not None:
            yield self._copy
        else:
            with model.disable_adapter():  # type: ignore[operator]
                yield model

    def head(self, model: nn.Module) -> LMHead | None:
        if self._copy is not None:
            return model_head(self._copy).detach()
        # `modules_to_save` keeps a trained copy of the head beside the original one.
        return model_head(model).detach() if self._head_is_trained else None


class EMATeacher(Teacher):
    """A moving average: `theta_t = decay theta_t + (1 - decay) theta_s` at each `update`, starting at the student.

    Attributes:
        decay: weight of the old average.
        updates: number of updates so far.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        """Move the average towards the student's weights, once."""
        self.follow(model)
        self._update(model)
        self.updates += 1

    @abstractmethod
    def _update(self, model: nn.Module) -> None: ...

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
        if state["mode"] != self.mode:
            raise ValueError(
                f"the saved teacher is ema={state['mode']!r} but this run has ema={self.mode!r}; resume with the mode "
                "of the checkpoint"
            )
        own, saved = self.tensors(), state["tensors"]
        if own.keys() != saved.keys():
            difference = sorted(own.keys() ^ saved.keys())
            raise ValueError(
                f"the saved teacher belongs to another model or adapter: {len(difference)} names differ, the first is "
                f"{difference[0]!r}"
            )
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
                raise ValueError(
                    f"{name!r} of the saved teacher is {saved[name].dtype} {tuple(saved[name].shape)}, expected "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self.updates = int(state["updates"])
        self._after_load()

    def _after_load(self) -> None:
        """Bring what is derived from the averages up to date."""


class FullEMATeacher(EMATeacher):
    """Full fine-tuning: a copy of the model whose trained weights are averages. Frozen weights are shared with the
    student. For a 16-bit student the copy runs in 16 bits and is rounded from a float32 average at each update."""

    mode = "full"

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(decay)
        if is_peft(model):
            raise ValueError(
                "ema='full' averages the trained weights of a whole model, but this is a PEFT model, whose base never "
                "moves; use ema='adapter' or ema='merged'"
            )
        names = list(trained_parameters(model))
        self._copy = _frozen_copy(model)
        parameters = _named_parameters(self._copy)
        self._parameters = {name: parameters[name] for name in names}
        # A float32 copy is its own average; a 16-bit one is rounded from a wider one.
        self._averages = {
            name: parameter.data if parameter.dtype in (torch.float32, torch.float64) else parameter.data.float()
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        if not _match(self._copy, model):
            return
        parameters = _named_parameters(self._copy)
        self._parameters = {name: parameters[name] for name in self._parameters}
        for name, parameter in self._parameters.items():
            average = self._averages[name].to(parameter.device)
            # A weight as wide as its average holds it. After a cast from 16 bits that is the average, not its rounding.
            if parameter.dtype == average.dtype:
                parameter.data = average
            self._averages[name] = average
        self._after_load()

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self._copy

    def head(self, model: nn.Module) -> LMHead | None:
        return model_head(self._copy).detach()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._averages

    @torch.no_grad()
    def _update(self, model: nn.Module) -> None:
        student = _named_parameters(model)
        ema_update_(self._averages.values(), [student[name] for name in self._averages], self.decay)
        self._after_load()

    @torch.no_grad()
    def _after_load(self) -> None:
        for name, average in self._averages.items():
            if self._parameters[name].dtype != average.dtype:
                self._parameters[name].copy_(average)


class AdapterEMATeacher(EMATeacher):
    """LoRA: every trained tensor (A, B and what else is trained) averaged on its own and swapped in for scoring.

    Cheap, and what averaging an adapter's checkpoint does; but mean(B) mean(A) is not mean(B A), the average of the
    weights themselves. `MergedEMATeacher` is.
    """

    mode = "adapter"

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(decay)
        _require_peft(model, self.mode)
        self._averages = {name: _wide(parameter) for name, parameter in trained_parameters(model).items()}

    def follow(self, model: nn.Module) -> None:
        _move(self._averages, _named_parameters(model))

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        with _swapped(model, self._averages):
            yield model

    def head(self, model: nn.Module) -> LMHead | None:
        return model_head(model).detach() if head_is_trained(model) else None

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._averages

    def _update(self, model: nn.Module) -> None:
        student = _named_parameters(model)
        ema_update_(self._averages.values(), [student[name] for name in self._averages], self.decay)


class MergedEMATeacher(EMATeacher):
    """LoRA: the exact average of what the adapter adds to each weight, `mean(scaling B A)`, kept dense.

    The average of products of rank r has a growing rank, so it cannot be held as another A and B. While scoring, B is
    zero, which silences the adapter exactly, and a forward hook on each adapted layer adds `x mean(scaling B A)^T`.
    Trained tensors outside of LoRA layers are averaged and swapped in as in `AdapterEMATeacher`.
    """

    mode = "merged"

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(decay)
        _require_peft(model, self.mode)
        layers = _lora_layers(model)
        self._deltas = {name: _product(layer) for name, layer in layers.items()}
        adapter = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
        self._others = {
            name: _wide(parameter)
            for name, parameter in trained_parameters(model).items()
            if id(parameter) not in adapter
        }

    def follow(self, model: nn.Module) -> None:
        layers = _lora_layers(model)
        _move(self._deltas, {name: layer.lora_B[_adapters(layer)[0]].weight for name, layer in layers.items()})
        _move(self._others, _named_parameters(model))

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        layers = _lora_layers(model)
        silenced = {
            f"{name}.lora_B.{adapter}.weight": torch.zeros_like(layer.lora_B[adapter].weight)
            for name, layer in layers.items()
            for adapter in _adapters(layer)
        }
        with ExitStack() as stack:
            stack.enter_context(_swapped(model, {**self._others, **silenced}))
            for name, layer in layers.items():
                handle = layer.register_forward_hook(_adding(self._deltas[name]))
                stack.callback(handle.remove)
            yield model

    def head(self, model: nn.Module) -> LMHead | None:
        return model_head(model).detach() if head_is_trained(model) else None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**{f"{name}.delta": delta for name, delta in self._deltas.items()}, **self._others}

    def _update(self, model: nn.Module) -> None:
        layers = _lora_layers(model)
        for name, delta in self._deltas.items():  # one dense product at a time
            ema_update_([delta], [_product(layers[name])], self.decay)
        student = _named_parameters(model)
        ema_update_(self._others.values(), [student[name] for name in self._others], self.decay)


def make_teacher(model: nn.Module, *, teacher: str, ema: str, decay: float) -> Teacher:
    """The teacher of a run.

    Args:
        model: the student, unwrapped, on its device, with the weights it starts from.
        teacher, ema, decay: as in `UniSDConfig`; `ema="auto"` is "adapter" for a PEFT model, else "full".

    Raises:
        ValueError: a mode that does not fit the model.
    """
    if teacher == "base":
        return BaseTeacher(model)
    if ema == "none":
        return SelfTeacher()
    if ema == "auto":
        ema = "adapter" if is_peft(model) else "full"
    classes: dict[str, type[FullEMATeacher | AdapterEMATeacher | MergedEMATeacher]] = {
        "full": FullEMATeacher,
        "adapter": AdapterEMATeacher,
        "merged": MergedEMATeacher,
    }
    return classes[ema](model, decay)


def save_teacher(teacher: EMATeacher, folder: str | os.PathLike[str], global_step: int) -> Path:
    """Write the average into a checkpoint folder, in one step: a reader finds the whole file or none.

    Returns:
        The file.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = teacher.state_dict()
    metadata = {"mode": state["mode"], "updates": str(state["updates"]), "global_step": str(global_step)}
    temporary = folder / f".{STATE_FILE}.{os.getpid()}"
    try:
        save_file({name: tensor.contiguous() for name, tensor in state["tensors"].items()}, temporary, metadata)
        os.replace(temporary, folder / STATE_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / STATE_FILE


def load_teacher(teacher: EMATeacher, folder: str | os.PathLike[str], global_step: int) -> None:
    """Restore the average from a checkpoint folder.

    Args:
        global_step: of the checkpoint; the file must be of the same step.

    Raises:
        ValueError: the file is missing, of another step, mode or model.
    """
    from safetensors import safe_open

    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the checkpoint is incomplete or was written without a moving-average teacher. "
            "Resume from another checkpoint, or train with ema='none'; restarting the average silently would change "
            "the run"
        )
    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
    if int(metadata["global_step"]) != global_step:
        raise ValueError(
            f"{path} was written at step {metadata['global_step']} but the checkpoint is of step {global_step}: it "
            "mixes two runs; resume from another one"
        )
    teacher.load_state_dict({"mode": metadata["mode"], "updates": int(metadata["updates"]), "tensors": tensors})


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in _named_parameters(model).items() if parameter.requires_grad}


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    # torch.compile's wrapper prefixes the names; an average must not depend on whether the student is compiled.
    return {name.removeprefix("_orig_mod."): parameter for name, parameter in model.named_parameters()}


def _require_peft(model: nn.Module, mode: str) -> None:
    if not is_peft(model):
        raise ValueError(f"ema={mode!r} averages a PEFT adapter, but the model has none; use ema='full'")


def _wide(parameter: torch.Tensor) -> torch.Tensor:
    """A float32 (float64 for float64) copy."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.detach().to(dtype, copy=True)


def _move(averages: dict[str, torch.Tensor], like: dict[str, Any]) -> None:
    """Each average to the device of the tensor of its name, in its own dtype."""
    for name, average in averages.items():
        if average.device != like[name].device:
            averages[name] = average.to(like[name].device)


@torch.no_grad()
def _match(copied: nn.Module, model: nn.Module) -> bool:
    """Bring the parameters and buffers of a copy to the devices and dtypes of the model's.

    Returns:
        Whether any was elsewhere.
    """
    model, copied = getattr(model, "_orig_mod", model), getattr(copied, "_orig_mod", copied)
    sources = dict(model.named_modules())
    moved: dict[int, nn.Parameter] = {}  # a tied weight is moved once, and stays tied
    changed = False
    for name, module in copied.named_modules():
        source = sources[name]
        for tensors, like in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
            for key, tensor in tensors.items():
                other = like.get(key)
                if tensor is None or other is None or (tensor.device, tensor.dtype) == (other.device, other.dtype):
                    continue
                changed = True
                if isinstance(tensor, nn.Parameter):
                    if id(tensor) not in moved:
                        moved[id(tensor)] = nn.Parameter(tensor.detach().to(other), requires_grad=False)
                    tensors[key] = moved[id(tensor)]
                else:
                    tensors[key] = tensor.to(other)
    return changed


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode that shares the parameters which are not trained."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def gathered_head(model: nn.Module) -> AbstractContextManager[None]:
    """Under ZeRO-3, with the head in one piece; nothing elsewhere. Not to be held during a pass of the backbone, which
    gathers and releases a tied weight itself."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return maybe_gather_lm_head_ctx(head.weight, getattr(head, "bias", None))  # type: ignore[arg-type]


def head_is_trained(model: nn.Module) -> bool:
    """Whether the output head gets a gradient."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return any(parameter.requires_grad for parameter in head.parameters())


@contextmanager
def _swapped(model: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let the named parameters hold `values` (in their own dtype), then give them their own storage back."""
    parameters = _named_parameters(model)
    originals = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(originals[name].dtype)
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers of a model by name.

    Raises:
        ValueError: an adapter whose contribution is not `scaling B A x` (DoRA and other variants, embeddings,
            convolutions, LoRA biases, other PEFT methods).
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        name = name.removeprefix("_orig_mod.")
        reason = None
        if not isinstance(module, LoraLayer):
            reason = f"it is a {type(module).__name__}"
        elif getattr(module, "lora_variant", None) or any(getattr(module, "use_dora", {}).values()):
            reason = "it uses a LoRA variant such as DoRA"
        elif any(not isinstance(part, nn.Linear) for part in module.lora_B.values()) or module.lora_embedding_A:
            reason = "it adapts an embedding or a convolution"
        elif any(part.bias is not None for part in module.lora_B.values()):
            reason = "it has a LoRA bias"
        if reason is not None:
            raise ValueError(
                f"ema='merged' needs plain LoRA on linear layers, but for {name!r} {reason}; use ema='adapter'"
            )
        layers[name] = module
    return layers


def _adapters(layer: Any) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


@torch.no_grad()
def _product(layer: Any) -> torch.Tensor:
    """What the active adapters of a LoRA layer add to its weight: sum of scaling B A, float32 [out, in]."""
    delta = None
    for adapter in _adapters(layer):
        b, a = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
        product = (b.float() @ a.float()) * layer.scaling[adapter]
        delta = product if delta is None else delta + product
    if delta is None:
        raise ValueError("a LoRA layer has no active adapter; activate one with model.set_adapter(name)")
    return delta


def _adding(delta: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        return output + functional.linear(x, delta.to(x.dtype)).to(output.dtype)

    return hook
