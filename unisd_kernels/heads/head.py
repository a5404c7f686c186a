"""The output head: everything between the last hidden state and the logits, as one value."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from unisd_kernels.heads.shard import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class LMHead:
    """A language-model head `z = softcap_c(a * (h W^T + b))`, with `softcap_c(x) = c * tanh(x / c)`.

    The temperature is not part of the head: it is an argument of each operation.

    Args:
        weight: [V, H], float32, float64, bfloat16 or float16. A gradient is computed for it only if it requires one.
        bias: [V] or None, in the weight's dtype.
        logit_scale: `a`, finite and not zero.
        softcap: `c` > 0, or None for no cap.
        vocab_size: use only the first `vocab_size` rows. For heads padded to different sizes (Qwen2.5 ships 151936
            and 152064 columns), give both heads the number of real tokens; the padding columns then take no part
            in the softmax and get no gradient. None uses all rows.
        group, vocab_start: a vocabulary-parallel head (docs/tensor-parallel.md): each rank of this
            torch.distributed process group holds the rows [vocab_start, vocab_start + rows of `weight`) of the whole
            weight, and their bias. The slices tile the vocabulary, in any sizes, also none. To construct such a head is
            a collective call of the group, and so is every operation with it: all ranks make the same calls with the
            same rows and settings. `vocab_size` then counts the whole vocabulary.
        shard: what the ranks found out about each other's slices; not to be given, `dataclasses.replace` carries it.

    Raises:
        TypeError, ValueError: for anything that is not a usable head, saying what was got.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    vocab_start: int | None = None
    group: ProcessGroup | None = None
    shard: VocabShard | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.weight, torch.Tensor):
            raise TypeError(f"LMHead.weight must be a torch.Tensor [V, H], got {type(self.weight).__name__}")
        if self.weight.dtype not in _DTYPES:
            raise TypeError(
                "LMHead.weight must be a floating-point tensor (float32, float64, bfloat16 or float16), got "
                f"{self.weight.dtype}; dequantize a quantized head first (it is the largest matrix product of the "
                "loss, so this usually pays)"
            )
        # A slice of a vocabulary may be empty.
        if self.weight.dim() != 2 or (self.weight.shape[0] == 0 and self.group is None) or self.weight.shape[1] == 0:
            raise ValueError(
                f"LMHead.weight must have shape [V, H] with V, H > 0, got {tuple(self.weight.shape)}; a sharded "
                "parameter (ZeRO-3, FSDP) has to be gathered first"
            )
        if self.bias is not None:
            if not isinstance(self.bias, torch.Tensor):
                raise TypeError(f"LMHead.bias must be a torch.Tensor [V] or None, got {type(self.bias).__name__}")
            if self.bias.shape != self.weight.shape[:1]:
                raise ValueError(
                    f"LMHead.bias must have shape [{self.weight.shape[0]}] (one entry a row of the weight), "
                    f"got {tuple(self.bias.shape)}"
                )
            if self.bias.dtype != self.weight.dtype or self.bias.device != self.weight.device:
                raise TypeError(
                    f"LMHead.bias is {self.bias.dtype} on {self.bias.device} but LMHead.weight is "
                    f"{self.weight.dtype} on {self.weight.device}; convert one of them"
                )
        # Python's own numbers from here on: a numpy scalar would make arrays of what it touches.
        scale = _number("logit_scale", self.logit_scale)
        if not math.isfinite(scale) or scale == 0.0:
            raise ValueError(f"LMHead.logit_scale must be finite and not zero, got {self.logit_scale}")
        object.__setattr__(self, "logit_scale", scale)
        if self.softcap is not None:
            cap = _number("softcap", self.softcap)
            if not (math.isfinite(cap) and cap > 0):
                raise ValueError(f"LMHead.softcap must be a finite number > 0 or None, got {self.softcap}")
            object.__setattr__(self, "softcap", cap)
        if self.vocab_size is not None:
            if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, numbers.Integral):
                raise TypeError(
                    f"LMHead.vocab_size must be an integer or None, got {type(self.vocab_size).__name__} "
                    f"{_shown(self.vocab_size)}"
                )
            if self.group is None and not 0 < self.vocab_size <= self.weight.shape[0]:
                raise ValueError(
                    f"LMHead.vocab_size must be between 1 and the {self.weight.shape[0]} rows of the weight, "
                    f"got {self.vocab_size}"
                )
            object.__setattr__(self, "vocab_size", int(self.vocab_size))
        self._check_slice()

    def _check_slice(self) -> None:
        """Let the ranks of the group agree, unless this head is made of one for which they did."""
        if self.group is None and self.vocab_start is None:
            return
        if self.group is None or self.vocab_start is None:
            given, missing = ("vocab_start", "group") if self.group is None else ("group", "vocab_start")
            raise ValueError(
                f"LMHead got {given} without {missing}: a slice of a vocabulary needs both the process group whose "
                "ranks hold the slices and the column at which this rank's begins"
            )
        if isinstance(self.vocab_start, bool) or not isinstance(self.vocab_start, numbers.Integral):
            raise TypeError(
                f"LMHead.vocab_start must be an integer, got {type(self.vocab_start).__name__} "
                f"{_shown(self.vocab_start)}"
            )
        if self.vocab_start < 0:
            raise ValueError(f"LMHead.vocab_start must be >= 0, got {self.vocab_start}")
        if not (hasattr(self.group, "rank") and hasattr(self.group, "size")):
            raise TypeError(
                f"LMHead.group must be a torch.distributed process group, got {type(self.group).__name__}; "
                "take mesh.get_group() of a device mesh, torch.distributed.group.WORLD for all processes"
            )
        object.__setattr__(self, "vocab_start", int(self.vocab_start))
        if self.shard is None:
            shard = VocabShard.agree(
                self.group,
                self.vocab_start,
                self.weight,
                self.bias,
                self.vocab_size,
                self.logit_scale,
                self.softcap,
            )
            object.__setattr__(self, "shard", shard)

    @property
    def num_columns(self) -> int:
        """Number of columns of the softmax: `vocab_size`, or all rows of the weight (of the weights of all ranks)."""
        if self.shard is not None:
            return self.shard.total_columns
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def num_rows(self) -> int:
        """Rows of the weight (of the weights of all ranks), padding and all."""
        return self.weight.shape[0] if self.shard is None else self.shard.num_rows

    @property
    def _num_active(self) -> int | None:
        """Rows of `weight` that are columns of the softmax; None for all."""
        return self.vocab_size if self.shard is None else self.shard.num_columns

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.weight.shape[1]

    @property
    def active_weight(self) -> torch.Tensor:
        """[num_columns, H], a view of the weight (so its gradient is zero on the padding rows); of a slice of a
        vocabulary this rank's columns."""
        return self.weight if self.vocab_size is None else self.weight[: self._num_active]

    @property
    def active_bias(self) -> torch.Tensor | None:
        """[num_columns] or None; of a slice of a vocabulary this rank's columns."""
        if self.bias is None or self.vocab_size is None:
            return self.bias
        return self.bias[: self._num_active]

    def require_whole(self, what: str) -> None:
        """Raise if only a slice of the vocabulary is here.

        Raises:
            ValueError: naming `what` needs the whole head.
        """
        if self.shard is not None:
            raise ValueError(
                f"{what} is of one process and takes no vocabulary-parallel head (group=): give the whole head on "
                "every rank, or take an operation and impl that exchange statistics"
            )

    def is_same(self, other: LMHead) -> bool:
        """Whether both are one head: the same weight and bias in memory, the same scale, cap and columns."""
        return (
            (self.logit_scale, self.softcap) == (other.logit_scale, other.softcap)
            and same_memory(self.active_weight, other.active_weight)
            and same_memory(self.active_bias, other.active_bias)
            and (self.shard is other.shard is None or (self.shard is not None and self.shard.is_like(other.shard)))
        )

    def detach(self) -> LMHead:
        """The same head, frozen: no gradient reaches its weight or bias."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    @classmethod
    def from_model(cls, model: Any, *, vocab_size: int | None = None, verify: bool = True) -> LMHead:
        """Read the head of a Hugging Face causal language model (or of a PEFT model around one).

        Scale and cap come from the model's configuration (`final_logit_softcapping`, `logit_scale`, `logits_scaling`,
        ...), but the names there are only hints. The model's own forward decides: it runs on eight token ids, and once
        more with made-up hidden states in place of its backbone's, so large that every cap in use shows. Of the
        readings of the configuration the one is taken whose log-probabilities agree with the model's own, within
        what rounding in its dtype explains (`unisd_kernels.heads.check`).

        That costs three passes over eight tokens, on the model's device, in eval mode and without gradients; training
        mode, random number generators and caches are left alone. In a loop, read the head once:
        it refers to the live weight, which training changes in place.

        A weight that tensor parallelism has cut by rows over a device mesh (a DTensor with `Shard(0)`, as the
        `tp_plan` of transformers makes it: `colwise_gather_output`, `colwise_rep`) gives a vocabulary-parallel head of
        this rank's slice; the call is then a collective of the mesh's group, the check as well, which compares all
        columns on every rank. Of a mesh of several dimensions it is the one named "tp", and the weight is gathered over
        the others. Every other DTensor is gathered.

        Args:
            model: has `get_output_embeddings()`, `config`, a backbone, and takes token ids alone.
            vocab_size: see `LMHead`. None takes as many columns as the model's own forward gives.
            verify: False runs nothing and believes the configuration's names, which is a guess (Gemma's caps and
                Cohere's, Granite's and Falcon-H1's scales are read rightly). For a model that cannot be run as it is:
                sharded, or in need of other inputs.

        Raises:
            ValueError: the head does not agree with the model's own logits (by how much, and which scale or cap would
                explain it) or cannot be compared with them; no output embeddings, or not one linear layer; an adapter
                on the head (its weight alone would be the wrong head); a head that is sharded or on the meta device.
            TypeError: a quantized head.
        """
        from unisd_kernels.heads.causal_model import head_parts
        from unisd_kernels.heads.check import form_of

        parts = head_parts(model)._asdict()
        head = cls(**parts, vocab_size=vocab_size)  # what is no head is refused before anything runs
        form = form_of(model, head, verify)
        return cls(**parts, logit_scale=form.logit_scale, softcap=form.softcap, vocab_size=form.vocab_size)


def same_memory(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are one, in the same shape and dtype; None is None."""
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _number(name: str, value: Any) -> float:
    """A real number as a Python float; numpy's scalars are real numbers too, True and tensors are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = "; take .item() of a tensor" if isinstance(value, torch.Tensor) else ""
        raise TypeError(f"LMHead.{name} must be a number, got {type(value).__name__} {_shown(value)}{hint}")
    return float(value)


def _shown(value: Any) -> str:
    return "" if isinstance(value, torch.Tensor) else repr(value)[:40]
