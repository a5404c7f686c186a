"""The CUDA library builds without a GPU, its kernels keep to the registers, and its operation registers itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from csrc import nvcc

NVCC = nvcc.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


class Kernel(NamedTuple):
    """ptxas' report of a kernel for one architecture; bytes but for the registers."""

    name: str
    arch: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int


def kernels(printed: str) -> list[Kernel]:
    found = []
    for entry in re.split(r"Compiling entry function ", printed)[1:]:
        header = re.match(r"'(\S+)' for '(\w+)'", entry)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        used = re.search(r"Used (\d+) registers", entry)
        if header is None or frame is None or used is None:
            pytest.fail(f"ptxas prints something else than before:\n{entry[:500]}")
        shared = re.search(r"(\d+) bytes smem", entry)
        numbers = (int(number) for number in (*frame.groups(), used[1], shared[1] if shared else 0))
        found.append(Kernel(header[1], header[2], *numbers))
    return found


@pytest.fixture(scope="module")
def target() -> nvcc.TorchTarget:
    """Target of the running torch, if that has what is linked."""
    found = nvcc.torch_target()
    if missing := [name for name in found.libraries if not (found.library_folder / f"lib{name}.so").exists()]:
        # A torch built for CUDA has them, or something is wrong.
        assert torch.version.cuda is None
        pytest.skip(f"torch {torch.__version__} has no {missing}, which the CUDA library links before torch 2.13")
    return found


@pytest.fixture(
    scope="module",
    params=["sm_90", "sm_80 sm_90 sm_100"],
)
def archs(request: pytest.FixtureRequest) -> set[str]:
    return set(request.param.split())


@pytest.fixture(scope="module")
def built(target: nvcc.TorchTarget, archs: set[str], built_once) -> tuple[Path, str]:
    """Library, and what the compiler printed."""

    def build(folder: Path) -> None:
        printed = nvcc.build(folder / "_C_cuda.abi3.so", sorted(int(arch[3:]) for arch in archs), target)
        (folder / "printed.txt").write_text(printed)

    folder = built_once(f"cuda_{len(archs)}", build)
    return folder / "_C_cuda.abi3.so", (folder / "printed.txt").read_text()


@pytest.mark.exhaustive  # nvcc takes ten seconds
def test_compiles_without_warnings(built):
    library, printed = built
    assert library.exists()
    assert "warning" not in printed


@pytest.mark.exhaustive  # nvcc takes ten seconds
def test_kernels_do_not_spill(built, archs):
    """Nor keep arrays in local memory; and static shared memory stays far below the 48 KiB that every launch has."""
    found = kernels(built[1])
    # Names hold a hash of the source's path and options, the same for every architecture.
    by_arch = [{kernel.name for kernel in found if kernel.arch == arch} for arch in archs]
    assert all(names == by_arch[0] for names in by_arch)
    assert len(by_arch[0]) > 20
    for kernel in found:
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), kernel
        # Four blocks of 256 threads on a multiprocessor with 65536 registers.
        assert kernel.registers <= 64, kernel
        assert kernel.shared < 48 * 1024, kernel


@pytest.mark.exhaustive  # nvcc takes ten seconds
def test_the_operation_registers(built, target, tmp_path):
    """In a fresh process, where only the schemas (csrc/ops.cpp) and this library are loaded."""
    assert NVCC is not None
    schemas, compiled = tmp_path / "schemas.so", tmp_path / "ops.o"
    for command in (
        nvcc.compile_command(NVCC, nvcc.CSRC / "ops.cpp", compiled, [90], target),
        nvcc.link_command(NVCC, [compiled], schemas, target),
    ):
        subprocess.run(command, check=True, capture_output=True)
    script = f"""
import torch
torch.ops.load_library({str(schemas)!r})
torch.ops.load_library({str(built[0])!r})
print(torch._C._dispatch_has_kernel_for_dispatch_key("unisd::ema_update_", "CUDA"))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "True\n"


# What our code might use of torch's newer headers and torch 2.10's do not have.
NEWER_THAN_2_10 = (
    "TORCH_VERSION_2_11_0",
    "TORCH_VERSION_2_12_0",
    "TORCH_VERSION_2_13_0",
    "STABLE_TORCH_ERROR_CODE_CHECK",
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("version", [(2, 10), (2, 13)])
def test_both_ways_to_the_stream_compile(version, tmp_path):
    """stream.h differs by target; the library above covers only the one of the running torch. Headers of torch 2.10 are
    made from those of a newer one: without its newer names, which may not be mentioned."""
    assert NVCC is not None
    try:
        target = nvcc.torch_target(version)
    except ValueError as error:
        pytest.skip(str(error))
    command = nvcc.compile_command(NVCC, nvcc.CSRC / "cuda" / "ema_ops.cpp", tmp_path / "out.o", [90], target)
    if version == (2, 10):
        files = [*nvcc.CSRC.glob("cuda/*.*"), *nvcc.CSRC.glob("*.h")]
        included = re.findall(r"#include <(torch/\S+)>", "".join(path.read_text() for path in files))
        lines = [f"#include <{name}>" for name in sorted(set(included))]
        lines += [f"#undef {name}\n#pragma GCC poison {name}" for name in NEWER_THAN_2_10]
        older = tmp_path / "torch_2_10.h"
        older.write_text("\n".join(lines) + "\n")
        command += ["-include", str(older)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "warning" not in result.stderr


def test_errors_say_what_is_wrong(target, tmp_path, monkeypatch):
    broken = tmp_path / "broken.cu"
    broken.write_text("int main() { return undeclared_name; }\n")
    monkeypatch.setattr(nvcc, "sources", lambda: [broken])
    output = tmp_path / "never.so"
    with pytest.raises(RuntimeError, match=r"(?s)nvcc failed.*broken\.cu.*undeclared_name"):
        nvcc.build(output, [90], target)
    assert not output.exists()
    with pytest.raises(ValueError, match="at least one architecture"):
        nvcc.build(output, [], target)
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    with pytest.raises(FileNotFoundError, match="nvcc is not installed"):
        nvcc.build(output, [90], target)
