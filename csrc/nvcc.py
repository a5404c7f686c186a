"""Build the CUDA library, `unisd_kernels/_C_cuda.abi3.so`, by calling nvcc: `python csrc/nvcc.py --arch 80 90 100`.

Not with torch's `CUDAExtension`, which refuses to build where the running torch is a CPU-only one. No GPU is needed.
Nothing here imports torch before it is asked to build.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIBRARY = CSRC.parent / "unisd_kernels" / "_C_cuda.abi3.so"
# A100, H100 and H200, B200. The newest is also embedded as PTX, which later GPUs compile at load time.
ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class TorchTarget:
    """Torch that the library is for: its headers, the stable ABI's version, and the libraries to link (stream.h)."""

    include: Path
    library_folder: Path
    version: tuple[int, int]

    @property
    def define(self) -> str:
        major, minor = self.version
        return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"

    @property
    def libraries(self) -> list[str]:
        return ["torch_cpu"] if self.version >= (2, 13) else ["torch_cpu", "torch_cuda"]


def torch_target(version: tuple[int, int] | None = None) -> TorchTarget:
    """Target of the running torch.

    2.13 under a CPU-only torch that has it, so that the result loads there too; otherwise 2.10, the oldest that the
    package supports, so that one library serves every CUDA torch from then on."""
    import torch

    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert found is not None, torch.__version__
    running = (int(found[1]), int(found[2]))
    if version is None:
        version = (2, 13) if running >= (2, 13) and torch.version.cuda is None else (2, 10)
    if version > running:
        raise ValueError(f"the target {version[0]}.{version[1]} is newer than the torch it is built with, {running}")
    root = Path(torch.__file__).parent
    return TorchTarget(root / "include", root / "lib", version)


def find_nvcc() -> str | None:
    """Path of nvcc: from $CUDA_HOME, then the PATH, then the customary folder; None where it is in none."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    candidates = [*map(str, folders), *os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(candidates))


def sources() -> list[Path]:
    """Kernels (.cu) and their registrations (.cpp, host code only)."""
    folder = CSRC / "cuda"
    return sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")])


def gencode_flags(archs: Sequence[int]) -> list[str]:
    if not archs:
        raise ValueError("give at least one architecture, for example 90")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in sorted(set(archs))]
    newest = max(archs)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def compile_command(nvcc: str, source: Path, output: Path, archs: Sequence[int], target: TorchTarget) -> list[str]:
    # -lineinfo would grow the library; ptxas reports registers and spills, which the tests read.
    return [
        *(nvcc, "-std=c++17", "-O3", "-c", str(source), "-o", str(output)),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Xptxas", "-v", "-Xfatbin", "-compress-all"),
        *gencode_flags(archs),
        *("-DUSE_CUDA", target.define, "-isystem", str(target.include)),
    ]


def link_command(nvcc: str, objects: Sequence[Path], output: Path, target: TorchTarget) -> list[str]:
    # The CUDA runtime goes in statically: the library then does not care which one torch brings.
    return [
        *(nvcc, "-shared", "-cudart", "static", "-o", str(output), *map(str, objects)),
        *("-L", str(target.library_folder), *(f"-l{name}" for name in target.libraries)),
    ]


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc failed with {result.returncode}:\n{' '.join(command)}\n{result.stdout}")
    return result.stdout


def build(
    output: Path = LIBRARY, archs: Sequence[int] = ARCHS, target: TorchTarget | None = None, jobs: int | None = None
) -> str:
    """Compile and link; returns what the compiler printed, with registers and spills of every kernel.

    Raises:
        FileNotFoundError: no nvcc, or a torch without what the target links.
        RuntimeError: nvcc failed; with its output.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not installed: not under $CUDA_HOME/bin, on the PATH, or in /usr/local/cuda")
    target = target or torch_target()
    for name in target.libraries:
        if not (target.library_folder / f"lib{name}.so").exists():
            raise FileNotFoundError(
                f"the library for torch {target.version[0]}.{target.version[1]} links {name}, which this torch does "
                "not have: build with a CUDA torch, or with torch >= 2.13"
            )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.name}.o" for source in sources()]
        with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            commands = [compile_command(nvcc, *pair, archs, target) for pair in zip(sources(), objects, strict=True)]
            printed = list(pool.map(_run, commands))
        # Replaced in one step: a process that has the old one mapped keeps it, and a failed link leaves it alone.
        staged = output.with_name(output.name + ".new")
        try:
            printed.append(_run(link_command(nvcc, objects, staged, target)))
            staged.replace(output)
        finally:
            staged.unlink(missing_ok=True)
    return "".join(printed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LIBRARY, help="the library to write")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), help="compute capabilities, such as 80 90")
    parser.add_argument("--torch-target", choices=["2.10", "2.13"], help="oldest torch to run under; see stream.h")
    parser.add_argument("--jobs", type=int, help="compilers at a time; the number of processors by default")
    parser.add_argument("--verbose", action="store_true", help="print registers and spills of the kernels")
    options = parser.parse_args(arguments)
    major_minor = options.torch_target and tuple(map(int, options.torch_target.split(".")))
    try:
        printed = build(options.out, options.arch, torch_target(major_minor), options.jobs)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if options.verbose:
        print(printed, end="")
    print(f"built {options.out} for sm_{', sm_'.join(map(str, options.arch))}")


if __name__ == "__main__":
    main()
