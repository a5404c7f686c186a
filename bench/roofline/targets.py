"""The architectures that kernels are compiled for ahead of time, and how what the compiler made of one is read."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget

from bench.roofline.assembler import TOOLS, assemble

# What a product kernel must contain to run on the matrix units at full rate.
MATRIX_INSTRUCTIONS = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}
ARCHITECTURES = tuple(MATRIX_INSTRUCTIONS)
# Bytes of shared memory (AMD's LDS) a program may have.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
# Registers of a processor; of AMD's, those of a lane in each of its four vector units, and what they are given out in.
_REGISTERS, _AMD_REGISTERS, _AMD_GRANULE, _AMD_UNITS = 65536, 512, 8, 4


def is_amd(architecture: str) -> bool:
    return architecture.startswith("gfx")


def table_of(architecture: str) -> str:
    """The entry of `configs.TABLE` that runs there."""
    return "hip" if is_amd(architecture) else architecture


def target(architecture: str) -> GPUTarget:
    """Triton's name of it: AMD's data centre GPUs have 64 lanes in a warp."""
    if is_amd(architecture):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@dataclass(frozen=True)
class Code:
    """Registers of a thread, bytes spilled, advisories of the assembler, machine instructions (those of a loop counted
    once), how many of them multiply matrices or copy tiles in bulk (TMA), and how many programs fit a processor by
    registers and shared memory."""

    registers: int
    spilled: int
    advisories: tuple[str, ...]
    instructions: int
    matrix_instructions: int
    bulk_copies: int
    programs: int


def read(compiled: Any, architecture: str) -> Code:
    """What is in a kernel that `triton.compile` made."""
    # Warp specialization adds warps of its own.
    warps, shared = compiled.metadata.num_warps, SHARED_MEMORY[architecture] // max(compiled.metadata.shared, 1)
    matrix = MATRIX_INSTRUCTIONS[architecture]
    if is_amd(architecture):
        text = compiled.asm["amdgcn"]
        registers, spilled = of_amdgcn(text)
        given = -(-registers // _AMD_GRANULE) * _AMD_GRANULE
        programs = min(_AMD_REGISTERS // given * _AMD_UNITS // warps, shared)
        count = len(re.findall(r"^\t[a-z]\w+", text, re.MULTILINE))
        return Code(registers, spilled, (), count, len(re.findall(rf"^\t{matrix}", text, re.MULTILINE)), 0, programs)
    text = compiled.asm["ptx"]
    used = assemble(text, int(architecture.removeprefix("sm_")))
    programs = min(_REGISTERS // (used.registers * 32 * warps), shared)
    count, copies = _instructions(compiled.asm["cubin"]), text.count("cp.async.bulk.tensor")
    return Code(used.registers, used.spilled, used.advisories, count, text.count(matrix), copies, programs)


def of_amdgcn(text: str) -> tuple[int, int]:
    """Registers of a lane, accumulators among them, and bytes of scratch, from the notes behind AMD's assembly.

    Raises:
        ValueError: they are not there.
    """
    registers, scratch = (
        re.search(rf"^; {name}: (\d+)", text, re.MULTILINE) for name in ("TotalNumVgprs", "ScratchSize")
    )
    if registers is None or scratch is None:
        raise ValueError("this assembly does not end with its notes on registers; another Triton writes them otherwise")
    return int(registers[1]), int(scratch[1])


def _instructions(binary: bytes) -> int:
    """Machine instructions of the kernel, those of a loop counted once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", listing, re.MULTILINE))
