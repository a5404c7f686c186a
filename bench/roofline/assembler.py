"""Registers, spills and advisories of a kernel, from NVIDIA's assembler, the one that comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import get_ptxas

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """Registers of a thread, bytes spilled (stores and loads), and the numbers of the assembler's advisories.

    Those of the kind C75xx say that the code is right and slow. C7515: the matrix products are waited for one by one.
    """

    registers: int
    spilled: int
    advisories: tuple[str, ...]


def assemble(code: str, capability: int) -> Resources:
    """Assembles PTX for the compute capability it names, 90 for sm_90.

    Raises:
        RuntimeError: the assembler failed; with what it said.
    """
    assembler = Path(get_ptxas(capability).path)  # Triton has one for older GPUs too, which does not know newer PTX
    target = re.search(r"\.target (sm_\w+)", code)
    assert target is not None
    with tempfile.TemporaryDirectory() as scratch:
        source, binary = Path(scratch) / "kernel.ptx", Path(scratch) / "kernel.cubin"
        source.write_text(code)
        command = [str(assembler), "-v", f"--gpu-name={target[1]}", str(source), "-o", str(binary)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{assembler.name} failed with {done.returncode}:\n{done.stdout}")
    return resources(done.stdout)


def resources(printed: str) -> Resources:
    """Parse what the assembler printed with `-v`."""
    return Resources(
        max(int(number) for number in re.findall(r"Used (\d+) registers", printed)),
        sum(int(number) for number in re.findall(r"(\d+) bytes spill", printed)),
        tuple(sorted(set(re.findall(r"\b(C7\d{3})\b", printed)))),
    )
