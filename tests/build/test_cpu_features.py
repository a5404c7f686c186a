"""What cpu_features.h asks of the processor, against the kernel's list, and the set that the library then chooses."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unisd_kernels.backends import extension

PROBE = Path(__file__).parent / "kernels" / "features.cpp"
CPUINFO = Path("/proc/cpuinfo")
GXX = shutil.which("g++")

# Name in CpuFeatures, and the kernel's names of all it stands for.
AVX2 = {"avx", "avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
FEATURES = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512 | {"avx512_bf16"},
    "avx512_vnni": AVX512 | {"avx512_vnni"},
    "amx_bf16": AVX512 | {"amx_tile", "amx_bf16"},
}

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(), reason="cpuid is x86-64's, /proc/cpuinfo is Linux's"
)


def listed() -> set[str]:
    """Names in FEATURES that the kernel lists in full."""
    flags = set(next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split())
    return {name for name, needed in FEATURES.items() if needed <= flags}


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    if GXX is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("features") / "features"
    # Nothing of the host's processor in the options: it must be asked at run time.
    subprocess.run([GXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", str(PROBE), "-o", str(program)], check=True)
    return program


def test_the_features_are_those_the_kernel_lists(probe: Path):
    printed = subprocess.run([str(probe)], check=True, capture_output=True, text=True).stdout
    found = set(printed.split())
    # A kernel may list tiles whose state it does not keep.
    assert found - {"amx_bf16"} == listed() - {"amx_bf16"}
    assert found <= listed()
    granted = subprocess.run([str(probe), "amx"], check=True, capture_output=True, text=True).stdout
    if "amx_bf16" in found:
        assert granted == "granted\n"
    if "amx_bf16" not in listed():
        assert granted == "refused\n"


@pytest.mark.skipif(extension.cpu_unavailable() is not None, reason="the compiled library is not there")
def test_the_fastest_set_is_chosen():
    script = "from unisd_kernels.backends import extension; print(extension.cpu_isa())"
    environment = {name: value for name, value in os.environ.items() if name != "UNISD_CPU_ISA"}
    chosen = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    candidates = ["amx_bf16", "avx512_bf16", "avx512", "avx2"]
    if "GenuineIntel" in CPUINFO.read_text():
        candidates.remove("avx512_bf16")  # slower there than float32
    widest = next((name for name in candidates if name in listed()), "scalar")
    assert chosen.stdout == f"{widest}\n"
