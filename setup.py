"""Build of the compiled library, which pyproject.toml cannot describe.

`UNISD_BUILD` chooses what is built:

    unset   the CPU library if torch's headers and a C++ compiler are there, else pure Python with a warning
    none    pure Python
    cpu     the CPU library, or an error
    cuda    the CPU library and the CUDA library (needs nvcc), or an error

    manylinux_x86_64, manylinux_aarch64    the CPU library for any such machine with glibc 2.28, cross-compiled by the
            package ziglang (csrc/manylinux.py; needs --no-build-isolation), or an error

The CPU library uses LibTorch's stable ABI of torch 2.10 and Python's limited API of 3.10, so that one wheel
(`cp310-abi3`) fits every later version of both. torch itself is not imported here: only its headers and its library
are looked up. An isolated build (a plain `pip install .`) has no torch of its own, so the environment that is installed
into is searched too (csrc/find_torch.py).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOT = Path(__file__).resolve().parent
LOST = (
    "the package works without its compiled library, through PyTorch operations: slower on a CPU, and without the "
    "difference form that keeps the digits of a small divergence"
)


def cpu_extension(torch: Path) -> Extension:
    csrc = ROOT / "csrc"
    sources = [csrc / "ops.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    headers = [*csrc.glob("*.h"), *(csrc / "cpu").glob("*.h")]
    return Extension(
        "unisd_kernels._C",
        sources=[str(source.relative_to(ROOT)) for source in sources],
        depends=[str(header.relative_to(ROOT)) for header in headers],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000")],
        # No contraction: a * b + c is fused where the source says so and nowhere else.
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
        py_limited_api=True,
        language="c++",
    )


class Build(build_ext):
    """Builds the libraries; in the automatic mode a failure leaves a pure-Python installation and says so."""

    def run(self) -> None:
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            if MODE != "auto":
                raise
            warn(f"the CPU library could not be built ({error})")
            self.extensions = []
        if MODE == "cuda":
            build_cuda(Path(self.get_ext_fullpath("unisd_kernels._C")).parent)

    def build_extensions(self) -> None:
        if CROSS is None:
            super().build_extensions()
            return
        for extension in self.extensions:
            MANYLINUX.build(extension, Path(self.get_ext_fullpath(extension.name)), CROSS)


def build_cuda(directory: Path) -> None:
    load("nvcc").build(directory / "_C_cuda.abi3.so")


def load(name: str) -> ModuleType:
    """A module of csrc/, which is no package: setup.py runs before anything is installed."""
    spec = importlib.util.spec_from_file_location(f"unisd_{name}", ROOT / "csrc" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def warn(reason: str) -> None:
    print(f"\nwarning: unisd-kernels: {reason}; {LOST}.\n", file=sys.stderr)


def extensions() -> list[Extension]:
    if MODE == "none":
        return []
    torch = load("find_torch").torch_directory()
    # That of ziglang reports itself where it is missing.
    compiler = CROSS or os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    missing = None
    if torch is None:
        missing = (
            "no torch >= 2.10 was found in the environment that is installed into. Install torch first, or activate "
            "the environment that has it, then install this package again"
        )
    elif compiler is None:
        missing = "no C++ compiler was found (g++, clang++, or the one that CXX names)"
    if missing is None:
        assert torch is not None
        print(f"unisd-kernels: the CPU library is built with the headers of {torch}", file=sys.stderr)
        return [cpu_extension(torch)]
    if MODE != "auto":
        raise SystemExit(f"UNISD_BUILD={MODE}: {missing}")
    warn(missing)
    return []


MODE = os.environ.get("UNISD_BUILD", "auto") or "auto"
MANYLINUX = load("manylinux")
MODES = ("none", "cpu", "cuda", *(f"manylinux_{name}" for name in MANYLINUX.ARCHITECTURES))
if MODE not in ("auto", *MODES):
    raise SystemExit(f"UNISD_BUILD must be one of {', '.join(MODES)}, or unset, got {MODE!r}")
# Architecture of the machines that a wheel is made for here, if it is not made for this one.
CROSS = MODE.removeprefix("manylinux_") if MODE.startswith("manylinux_") else None

EXTENSIONS = extensions()
OPTIONS = {"py_limited_api": "cp310"} | ({"plat_name": MANYLINUX.platform_tag(CROSS)} if CROSS else {})
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": OPTIONS} if EXTENSIONS else {},
)
