"""The output head: everything between the last hidden state and the logits, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


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
        if not self.weight.is_floating_point():
            raise TypeError(
                f"LMHead.weight must be a floating-point tensor, got {self.weight.dtype}; dequantize a quantized head "
                "first (it is the largest matrix product of the loss, so this usually pays)"
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
        scale = float(self.logit_scale)
        if not math.isfinite(scale) or scale == 0.0:
            raise ValueError(f"LMHead.logit_scale must be finite and not zero, got {self.logit_scale}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"LMHead.softcap must be a finite number > 0 or None, got {self.softcap}")
        if self.vocab_size is not None and not 0 < self.vocab_size <= self.weight.shape[0]:
            raise ValueError(
                f"LMHead.vocab_size must be between 1 and the {self.weight.shape[0]} rows of the weight, "
                f"got {self.vocab_size}"
            )

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

    def detach(self) -> LMHead:
        """The same head, frozen: no gradient reaches its weight or bias."""
        bias = None if self.bias is None else self.bias.detach()
        return LMHead(self.weight.detach(), bias, self.logit_scale, self.softcap, self.vocab_size)

    @classmethod
    def from_model(cls, model: Any, *, vocab_size: int | None = None) -> LMHead:
        """Read the head of a Hugging Face causal language model (or of a PEFT model around one).

        The logit post-processing is taken from the model's text config: `final_logit_softcapping` (Gemma),
        `logit_scale` (Cohere), `lm_head_multiplier` (Falcon-H1), `output_multiplier`, and `logits_scaling`, by which
        Granite and MiniCPM divide and HyperCLOVA X multiplies.

        Args:
            model: has `get_output_embeddings()` and `config`.
            vocab_size: see `LMHead`.

        Raises:
            ValueError: no output embeddings; an adapter on the head (its weight alone would be the wrong head); a
                head that is sharded or on the meta device.
            TypeError: a quantized head.
        """
        get_output_embeddings = getattr(model, "get_output_embeddings", None)
        head = get_output_embeddings() if callable(get_output_embeddings) else None
        if head is None:
            raise ValueError(
                f"LMHead.from_model needs a model with output embeddings, got {type(model).__name__}; "
                "build LMHead(weight, bias, ...) yourself"
            )
        if hasattr(head, "base_layer"):
            raise ValueError(
                "the model has a PEFT adapter on its output head: reading `lm_head.weight` would silently ignore the "
                "adapter. Remove 'lm_head' from target_modules (or merge the adapter first)"
            )
        weight = head.weight
        bias = getattr(head, "bias", None)
        if type(weight).__name__ == "DTensor":
            weight = weight.full_tensor()
            bias = bias.full_tensor() if bias is not None else None
        if weight.numel() == 0 and hasattr(weight, "ds_id"):
            raise ValueError(
                "the head is partitioned by DeepSpeed ZeRO-3: build the LMHead inside "
                "`deepspeed.zero.GatheredParameters([lm_head.weight])`"
            )
        if weight.device.type == "meta":
            raise ValueError("the head is on the meta device (offloaded or not loaded): load its weights first")
        config = model.config
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        return cls(
            weight=weight,
            bias=bias,
            logit_scale=_logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
            vocab_size=vocab_size,
        )


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # The one name with two meanings: HyperCLOVA X multiplies by it, Granite and MiniCPM3 divide by it.
    return float(scaling) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(scaling)
