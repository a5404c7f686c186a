"""Tile shapes: a table by architecture, and a measurement for who wants one.

The table's entries are reasoned, not searched: the largest tile whose accumulators and statistics fit the registers
without a spill, and as many stages as fit the shared memory. `tests/triton` compiles every entry and fails on a spill.
With `UNISD_TRITON_AUTOTUNE=1` the few candidates of an architecture are timed at the first call of a shape, and the
winner is kept in the user's cache directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from unisd_kernels.backends.triton.launch import architecture, has_whole_vectors, supports_tma
from unisd_kernels.cache import cache_directory
from unisd_kernels.files import replacing


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a product kernel.

    Attributes:
        rows, columns, width: of a tile, and the step along the inner dimension.
        warps, stages: of a program; of its software pipeline.
        parts: blocks of statistics a tile (fused divergence).
        occupancy: programs that share a multiprocessor; with two, the products of one run beside the statistics of the
            other.
        descriptors: load through tensor descriptors (TMA) where the tensors allow it.
        flatten: make one loop of tiles and steps, so that the loads of a tile run ahead into the end of the last one.
        warp_specialize: loads, products and statistics in warps of their own.
    """

    rows: int
    columns: int
    width: int
    warps: int
    stages: int
    parts: int = 1
    occupancy: int = 1
    descriptors: bool = False
    flatten: bool = False
    warp_specialize: bool = False


# By architecture and kind; the first is the default, the others are candidates for a measurement. Kinds:
#
#   score              "-heavy" with an entropy or a soft cap (more is alive in registers), "-few" for at most 64 rows
#   fused-divergence   "-heavy" with a bias or a soft cap, "-separate" for two heads (two products one after the other)
#
# and of each "-plain" where rows start off alignment, so that they are loaded number by number, which costs registers,
# and "-float32" for such operands.
_PLAIN = GemmConfig(64, 64, 32, 8, 3)
_AMPERE: dict[str, tuple[GemmConfig, ...]] = {
    "score": (GemmConfig(128, 128, 64, 8, 3), GemmConfig(64, 128, 64, 8, 4)),
    "score-heavy": (GemmConfig(128, 128, 64, 8, 3), GemmConfig(64, 128, 64, 8, 4)),
    "score-few": (GemmConfig(64, 64, 64, 4, 4), GemmConfig(32, 128, 64, 4, 3)),
    "score-float32": (GemmConfig(64, 64, 32, 4, 3),),
    "fused-divergence": (GemmConfig(64, 128, 64, 8, 3, parts=2), GemmConfig(128, 64, 32, 8, 4)),
    "fused-divergence-heavy": (GemmConfig(64, 128, 64, 8, 3, parts=2), GemmConfig(128, 64, 32, 8, 4)),
    "fused-divergence-separate": (GemmConfig(64, 128, 64, 8, 3, parts=2),),
    "score-plain": (_PLAIN,),
    "fused-divergence-plain": (_PLAIN,),
    "fused-divergence-separate-plain": (_PLAIN,),
    "fused-divergence-float32": (GemmConfig(64, 64, 32, 8, 2),),
    "fused-divergence-separate-float32": (GemmConfig(64, 64, 32, 8, 2),),
}
_HOPPER: dict[str, tuple[GemmConfig, ...]] = {
    # Three stages and not four: measured on an H100 (docs/gpu.md), the more of a gain the smaller H is.
    "score": (
        GemmConfig(128, 256, 64, 8, 3, descriptors=True),
        GemmConfig(256, 128, 64, 8, 4, descriptors=True),
    ),
    "score-heavy": (
        GemmConfig(128, 128, 64, 8, 4, descriptors=True),
        GemmConfig(64, 256, 64, 8, 4, descriptors=True),
    ),
    "score-few": (
        GemmConfig(64, 128, 128, 4, 4, descriptors=True),
        GemmConfig(64, 64, 128, 4, 4, descriptors=True),
    ),
    "score-float32": _AMPERE["score-float32"],
    # Not flattened, and in one part: otherwise the assembler waits for every matrix product, or registers spill.
    "fused-divergence": (
        GemmConfig(128, 128, 64, 8, 3, descriptors=True),
        GemmConfig(128, 128, 128, 8, 2, descriptors=True),
    ),
    # Two parts: with a soft cap the epilogue of one spills.
    "fused-divergence-heavy": (GemmConfig(128, 64, 64, 8, 4, parts=2, descriptors=True),),
    "fused-divergence-separate": (GemmConfig(128, 64, 64, 8, 4, parts=2, descriptors=True),),
    "score-plain": (_PLAIN,),
    "fused-divergence-plain": (_PLAIN,),
    "fused-divergence-separate-plain": (_PLAIN,),
    "fused-divergence-float32": _AMPERE["fused-divergence-float32"],
    "fused-divergence-separate-float32": _AMPERE["fused-divergence-separate-float32"],
}
_BLACKWELL: dict[str, tuple[GemmConfig, ...]] = {
    "score": (
        GemmConfig(128, 256, 64, 8, 4, descriptors=True),
        GemmConfig(128, 128, 64, 8, 4, descriptors=True, warp_specialize=True),
    ),
    "score-heavy": (GemmConfig(128, 128, 64, 8, 4, descriptors=True),),
    "score-few": (GemmConfig(64, 128, 128, 4, 4, descriptors=True),),
    "score-float32": _AMPERE["score-float32"],
    "fused-divergence": (GemmConfig(128, 128, 64, 8, 3, parts=4, descriptors=True),),
    "fused-divergence-heavy": (GemmConfig(128, 128, 64, 8, 3, parts=4, descriptors=True),),
    # Two heads come here only when asked for; of the tiles tried this one alone spills nothing with and without a cap.
    "fused-divergence-separate": (GemmConfig(64, 128, 64, 8, 4, parts=4, descriptors=True),),
    "score-plain": (_PLAIN,),
    "fused-divergence-plain": (_PLAIN,),
    "fused-divergence-separate-plain": (_PLAIN,),
    "fused-divergence-float32": _AMPERE["fused-divergence-float32"],
    "fused-divergence-separate-float32": _AMPERE["fused-divergence-separate-float32"],
}
# AMD's data centre GPUs, whose programs have 64 KiB of shared memory (MI300) at least.
_AMD: dict[str, tuple[GemmConfig, ...]] = {
    **_AMPERE,
    "score": (GemmConfig(128, 128, 64, 8, 3), GemmConfig(64, 128, 64, 8, 3)),
    "score-heavy": (GemmConfig(128, 128, 64, 8, 3), GemmConfig(64, 128, 64, 8, 3)),
}
# The interpreter's time is per operation and not per element; odd shapes need more than one tile all the same.
_INTERPRETER: dict[str, tuple[GemmConfig, ...]] = {
    kind: (GemmConfig(16, 32, 16, 4, 1, parts=2 if "fused" in kind else 1),) for kind in _AMPERE
}
TABLE: dict[str, dict[str, tuple[GemmConfig, ...]]] = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "hip": _AMD,
    "interpreter": _INTERPRETER,
}
_ALIASES = {"sm_103": "sm_100"}


def candidates(kind: str, device: torch.device) -> tuple[GemmConfig, ...]:
    """Tiles of the table; a GPU that is not in it gets those of sm_80, which ask for the least shared memory."""
    name = architecture(device)
    return TABLE.get(_ALIASES.get(name, name), _AMPERE)[kind]


def with_loads(kind: str, *operands: torch.Tensor) -> str:
    """The kind for these 16-bit operands: its "-plain" one where rows of theirs start off alignment."""
    config = candidates(kind, operands[0].device)[0]
    aligned = supports_tma if config.descriptors else has_whole_vectors
    if all(aligned(operand) for operand in operands):
        return kind
    return f"{'score' if kind.startswith('score') else kind}-plain"


def autotuning() -> bool:
    return os.environ.get("UNISD_TRITON_AUTOTUNE", "0") not in ("", "0")


_winners: dict[str, GemmConfig] = {}
# Milliseconds of every candidate measured in this process, by the same keys.
measured: dict[str, dict[GemmConfig, float]] = {}


def choose(kind: str, device: torch.device, shape: Sequence[int], run: Callable[[GemmConfig], object]) -> GemmConfig:
    """The configuration for a product of this shape (rows, columns, width).

    The table's default, or, with `UNISD_TRITON_AUTOTUNE=1`, the fastest candidate: `run` launches one, and is called
    with each of them at the first call of a shape (rows rounded up to a power of two). A failure of one to launch
    raises. Never measures while a CUDA graph is being captured.
    """
    options = candidates(kind, device)
    if len(options) == 1 or device.type == "cpu" or not autotuning():
        return options[0]
    rows, *rest = (int(size) for size in shape)
    key = "/".join(map(str, (kind, 1 << max(rows - 1, 0).bit_length(), *rest)))
    if key not in _winners:
        stored = _load(device)
        if key in stored and stored[key] in options:
            _winners[key] = stored[key]
        elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return options[0]
        else:
            times = measured[key] = {option: _median_milliseconds(run, option) for option in options}
            _winners[key] = min(times, key=lambda option: times[option])
            _store(device, {**_load(device), key: _winners[key]})
    return _winners[key]


def _median_milliseconds(run: Callable[[GemmConfig], object], option: GemmConfig) -> float:
    return float(triton.testing.do_bench(lambda: run(option), warmup=5, rep=50, return_mode="median"))


def _file(device: torch.device) -> Path:
    # What a winner depends on besides the shape.
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    safe = "".join(c if c.isalnum() else "-" for c in f"{name}-triton-{triton.__version__}")
    return cache_directory() / f"tuning-{safe}.json"


def _load(device: torch.device) -> dict[str, GemmConfig]:
    path = _file(device)
    if not path.exists():
        return {}
    return {key: GemmConfig(**value) for key, value in json.loads(path.read_text()).items()}


def _store(device: torch.device, winners: dict[str, GemmConfig]) -> None:
    """Write the file as a whole, so that another process never reads half of one."""
    with replacing(_file(device)) as new:
        new.write_text(json.dumps({key: asdict(value) for key, value in sorted(winners.items())}, indent=1))
