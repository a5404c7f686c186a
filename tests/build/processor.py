"""What the kernel says of this processor, in the names of csrc/cpu."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Name in CpuFeatures, and the kernel's names of all it stands for.
AVX2 = {"avx", "avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
FEATURES = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512 | {"avx512_vnni", "avx512_bf16"},
    "avx512_vnni": AVX512 | {"avx512_vnni"},
    "amx_bf16": AVX512 | {"amx_tile", "amx_bf16"},
}


def listed() -> set[str]:
    """Names in FEATURES that the kernel lists in full."""
    flags = set(next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split())
    return {name for name, needed in FEATURES.items() if needed <= flags}


def fastest() -> str:
    """The instruction set that the library should choose: the widest, or the next where that is slower."""
    if platform.machine() == "aarch64":
        return "neon"
    candidates = ["amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2"]
    if "GenuineIntel" in CPUINFO.read_text():
        candidates.remove("avx512_bf16")  # slower there than float32
    return next((name for name in candidates if name in listed()), "scalar")
