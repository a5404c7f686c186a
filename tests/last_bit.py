"""Stands in for another processor: PyTorch's own products and sums come out with another last bit.

Another machine's matrix library adds in another order, so its results differ from this machine's by a rounding. With
UNISD_TEST_LAST_BIT=SEED the results of the library's reductions are moved by one unit in the last place (16-bit ones:
every sixteenth), as a hash of value, shape and seed decides. A test that passes here and fails so hangs on a bit that
nobody promised. The hash is the same for the same call, because one machine does repeat itself.

Only PyTorch's operations are moved: those of this package are the same everywhere but for the instruction set, which
UNISD_CPU_ISA chooses. What torch.compile makes is not moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_REDUCTIONS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "sum", "mean", "var", "logsumexp")
_REDUCTIONS += ("_softmax", "_log_softmax", "_scaled_dot_product_flash_attention_for_cpu", "native_layer_norm")
_FUNCTIONS = ("exp", "log", "tanh", "rsqrt")  # of another vector library
_MOVED = {getattr(torch.ops.aten, name) for name in _REDUCTIONS + _FUNCTIONS}


class LastBit(TorchDispatchMode):
    """Moves the last bit of every library reduction that runs inside.

    Args:
        seed: which elements are moved, and which way.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm and args[0].shape[1] == 1:
            return result  # one term has one sum
        if func.overloadpacket in _MOVED and func._overloadname.find("out") < 0:
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, torch.Tensor) and first.dtype in _INTEGERS and first.device.type == "cpu":
                with torch._C._DisableTorchDispatch():
                    self._move(first)
        return result

    def _move(self, values: torch.Tensor) -> None:
        bits = values.view(_INTEGERS[values.dtype])
        salt = hash((self._seed, tuple(values.shape))) & 0xFFFFFFF
        mixed = (bits.long() + salt) * 0x9E3779B97F4A7C15
        mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B
        mixed = mixed >> 33
        step = (mixed % 3) - 1
        if values.element_size() == 2:
            step = torch.where((mixed >> 4) % 16 == 0, step, 0)
        # Short numbers stay (0, 2.5): they are sums of short numbers and exact everywhere. So do infinities and NaN.
        magnitude = values.abs()
        ordinary = (magnitude > torch.finfo(values.dtype).tiny) & (magnitude < torch.finfo(values.dtype).max / 2)
        if values.element_size() > 2:
            ordinary &= bits & 0xFFF != 0
        bits += torch.where(ordinary, step, 0).to(bits.dtype)
