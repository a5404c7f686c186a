"""The output head: everything between the last hidden state and the logits, as one value."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch

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

    Raises:
        TypeError, ValueError: for anything that is not a usable head, saying what was got.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, torch.Tensor):
            raise TypeError(f"LMHead.weight must be a torch.Tensor [V, H], got {type(self.weight).__name__}")
        if self.weight.dtype not in _DTYPES:
            raise TypeError(
                "LMHead.weight must be a floating-point tensor (float32, float64, bfloat16 or float16), got "
                f"{self.weight.dtype}; dequantize a quantized head first (it is the largest matrix product of the "
                "loss, so this usually pays)"
            )
        if self.weight.dim() != 2 or self.weight.shape[0] == 0 or self.weight.shape[1] == 0:
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
            if not 0 < self.vocab_size <= self.weight.shape[0]:
                raise ValueError(
                    f"LMHead.vocab_size must be between 1 and the {self.weight.shape[0]} rows of the weight, "
                    f"got {self.vocab_size}"
                )
            object.__setattr__(self, "vocab_size", int(self.vocab_size))

    @property
    def num_columns(self) -> int:
        """Number of columns of the softmax: `vocab_size`, or all rows of the weight."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.weight.shape[1]

    @property
    def active_weight(self) -> torch.Tensor:
        """[num_columns, H], a view of the weight (so its gradient is zero on the padding rows)."""
        return self.weight if self.vocab_size is None else self.weight[: self.vocab_size]

    @property
    def active_bias(self) -> torch.Tensor | None:
        """[num_columns] or None."""
        if self.bias is None or self.vocab_size is None:
            return self.bias
        return self.bias[: self.vocab_size]

    def is_same(self, other: LMHead) -> bool:
        """Whether both are one head: the same weight and bias in memory, the same scale, cap and columns."""
        return (
            (self.logit_scale, self.softcap) == (other.logit_scale, other.softcap)
            and same_memory(self.active_weight, other.active_weight)
            and same_memory(self.active_bias, other.active_bias)
        )

    def detach(self) -> LMHead:
        """The same head, frozen: no gradient reaches its weight or bias."""
        bias = None if self.bias is None else self.bias.detach()
        return LMHead(self.weight.detach(), bias, self.logit_scale, self.softcap, self.vocab_size)

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
        from unisd_kernels.heads.causal_model import head_tensors
        from unisd_kernels.heads.check import form_of

        weight, bias = head_tensors(model)
        head = cls(weight, bias, vocab_size=vocab_size)  # what is no head is refused before anything runs
        form = form_of(model, weight, bias, head.vocab_size, verify)
        return cls(weight, bias, form.logit_scale, form.softcap, form.vocab_size)


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
