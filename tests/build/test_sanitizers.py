"""The CPU kernels under the address and undefined-behaviour sanitizers, and what their objects define."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
CHECK = Path(__file__).with_name("kernels_check.cpp")
SOURCES = [*sorted(CPU.glob("isa_*.cpp")), CPU / "dispatch.cpp", CHECK]
# The two warnings left out are gcc 12's about its own intrinsics.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
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
    result = run(GXX, *FLAGS, *flags, "-c", source, "-o", target)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return target


def test_every_kernel_under_the_sanitizers(tmp_path):
    """On buffers of exact size, against double arithmetic (kernels_check.cpp)."""
    assert GXX is not None
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if run(GXX, *SANITIZE, probe, "-o", tmp_path / "probe").returncode != 0:
        pytest.skip("g++ has no sanitizer libraries")
    objects = [compile_source(source, tmp_path / f"{source.stem}.o", "-O1", *SANITIZE) for source in SOURCES]
    program = tmp_path / "check"
    linked = run(GXX, *SANITIZE, *objects, "-o", program)
    assert linked.returncode == 0, linked.stderr
    # Nothing of the environment's, or a preloaded library or an option could hide a report.
    result = run(program, ASAN_OPTIONS="detect_leaks=1", UBSAN_OPTIONS="print_stacktrace=1", LD_PRELOAD="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    checked = result.stdout.split("\n")[:-1]
    assert checked
    assert checked[0] == "scalar ok"
    assert all(line in ("scalar ok", "avx2 ok", "avx512 ok") for line in checked)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the vector instruction sets are x86-64's")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_symbol_is_shared_between_instruction_sets(isa, tmp_path):
    """The linker keeps one of several weak definitions of the same function. If it were the one for a wide instruction
    set, a processor without that would stop at an illegal instruction."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    compiled = compile_source(CPU / f"isa_{isa}.cpp", tmp_path / "isa.o", "-O2", "-fPIC", "-fvisibility=hidden")
    listed = run("nm", "--defined-only", compiled)
    assert listed.returncode == 0, listed.stderr
    symbols = [line.split()[-2:] for line in listed.stdout.splitlines()]
    assert any("kernels" in name for _, name in symbols)
    own = re.compile(rf"_Z(GVZ|Z|TV|TI|TS)?NK?5unisd{len(isa)}{isa}")
    shared = [name for kind, name in symbols if kind in "WVuwv" and not own.match(name)]
    assert [name for name in shared if name != "DW.ref.__gxx_personality_v0"] == []
    # Nor may a strong one outside of the namespace clash, or be found by the name of another set.
    strong = [name for kind, name in symbols if kind in "TDBRG" and not own.match(name)]
    assert strong == []
