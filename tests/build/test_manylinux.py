"""What clang's family makes of the library for other machines than this (csrc/manylinux.py, by the package ziglang)."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from csrc import manylinux
from tests.build.processor import fastest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
CHECK = Path(__file__).parent / "kernels" / "check.cpp"


def test_the_functions_that_torch_declares():
    """Real ones: found in the library by name."""
    functions = manylinux.torch_functions(Path(torch.__file__).parent / "include")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert {"aoti_torch_library_init_impl", "aoti_torch_dtype_bfloat16", "torch_parallel_for"} <= set(functions)
    # Other devices' are in other libraries.
    assert [name for name in functions if not hasattr(library, name) and not re.search("cuda|xpu|mps", name)] == []


def test_without_its_compiler_the_build_says_what_to_install(monkeypatch):
    monkeypatch.setattr(manylinux.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install ziglang, and build with --no-build-isolation"):
        manylinux.compiler("x86_64")


def needs_ziglang() -> None:
    pytest.importorskip("ziglang", reason="ziglang is not installed: pip install ziglang")


@pytest.mark.exhaustive
@pytest.mark.skipif(platform.machine() not in manylinux.ARCHITECTURES, reason="no wheel is made for this processor")
def test_a_wheel_of_clang_chooses_the_fastest_set(tmp_path: Path):
    """And is right with it, and its errors reach Python. Clang's own question for the processor's features would find
    none here: it asks a part of the runtime library that this linker does not have."""
    needs_ziglang()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    for name in ("unisd_kernels", "unisd", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {name: value for name, value in os.environ.items() if name != "UNISD_CPU_ISA"}
    environment["UNISD_BUILD"] = f"manylinux_{platform.machine()}"
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-cp310-abi3-manylinux_2_28_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    script = """
import torch, unisd_kernels
from unisd.cli.doctor import self_test
from unisd_kernels.backends import extension
print(unisd_kernels.__file__)
print(extension.cpu_isa())
print(self_test("native", torch.device("cpu")))
try:
    extension.operations().vector_math("sin", torch.ones(4), torch.empty(4))
except RuntimeError as error:
    print(error)
"""
    environment["PYTHONPATH"] = str(tmp_path / "installed")
    run = [sys.executable, "-c", script]
    loaded = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    file, isa, error, message = loaded.stdout.splitlines()[:4]
    assert Path(file).is_relative_to(tmp_path / "installed")
    assert isa == fastest()
    assert float(error) < 1e-4
    expected = r"vector_math, csrc/cpu/tile_ops.cpp:\d+, function must be exp, log, expm1 or tanh, got sin"
    assert re.fullmatch(expected, message)

    library = (tmp_path / "installed" / "unisd_kernels" / "_C.abi3.so").read_bytes()
    needed = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", library)
    assert max((int(major), int(minor)) for major, minor in needed) <= (2, 28)
    assert not re.search(rb"\0GLIBCXX_", library)


@pytest.mark.exhaustive
def test_every_kernel_of_aarch64_under_emulation(tmp_path: Path):
    """NEON's against double arithmetic and against the scalar ones."""
    needs_ziglang()
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed: Debian's package qemu-user")
    program = tmp_path / "check"
    sources = [CPU / "isa_neon.cpp", CPU / "isa_scalar.cpp", CPU / "dispatch.cpp", CHECK]
    # With musl's C library, which goes into the program: there is none of this architecture to load.
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static"]
    options = ["-std=c++17", "-ffp-contract=off", "-Wall", "-O2", "-o", str(program)]
    done = subprocess.run([*command, *options, *map(str, sources)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    result = subprocess.run([emulator, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "scalar ok\nneon ok\n"
