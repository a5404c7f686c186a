"""The CPU kernels under the address and undefined-behaviour sanitizers (kernels/check.cpp)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
CHECK = Path(__file__).parent / "kernels" / "check.cpp"
ALL = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon")
# The two warnings left out are gcc 12's about its own intrinsics.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-O1"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not installed")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def compile_source(source: Path, target: Path, *flags: str) -> Path:
    assert GXX is not None
    result = run(GXX, *FLAGS, *SANITIZE, *flags, "-c", source, "-o", target)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return target


# One set alone compiles in a third of the time; the whole program also compares the sets with each other.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "isa",
    ["avx2" if platform.machine() == "x86_64" else "scalar", None],
)
def test_every_kernel_under_the_sanitizers(isa, tmp_path):
    """On buffers of exact size, against double arithmetic."""
    assert GXX is not None
    probe = tmp_path / "probe.cpp"
    probe.write_text('int main() { return !__builtin_cpu_supports("avx2"); }\n' if isa == "avx2" else "int main() {}\n")
    if run(GXX, *SANITIZE, probe, "-o", tmp_path / "probe").returncode != 0:
        pytest.skip("g++ has no sanitizer libraries")
    if run(tmp_path / "probe", LD_PRELOAD="").returncode != 0:
        pytest.skip("this processor has no AVX2")
    kernels = [CPU / f"isa_{isa}.cpp"] if isa else [*sorted(CPU.glob("isa_*.cpp")), CPU / "dispatch.cpp"]
    # Tiles in software: what is around them is checked on every processor with bfloat16 products.
    only = [f"-DCHECK_ONLY={isa}"] if isa else ["-DUNISD_SOFTWARE_TILES"]
    objects = [compile_source(source, tmp_path / f"{source.stem}.o", *only) for source in (*kernels, CHECK)]
    program = tmp_path / "check"
    linked = run(GXX, *SANITIZE, *objects, "-o", program)
    assert linked.returncode == 0, linked.stderr
    # Nothing of the environment's, or a preloaded library or an option could hide a report.
    result = run(program, ASAN_OPTIONS="detect_leaks=1", UBSAN_OPTIONS="print_stacktrace=1", LD_PRELOAD="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    checked = result.stdout.split("\n")[:-1]
    if isa:
        assert checked == [f"{isa} ok"]
    else:
        assert checked[0] == "scalar ok"
        assert all(line in [f"{name} ok" for name in ALL] for line in checked)
