"""Build the CPU library for another machine than this: manylinux_2_28 on x86_64 and aarch64, by the package `ziglang`.

Its clang brings the headers and stubs of each glibc and a libc++ of its own, which goes into the library and stays
hidden there: what is exchanged with torch is C only. torch's library for the other machine is not needed either. What
may be called of it is what torch's headers of the stable ABI declare, so a stand-in with these names is linked in its
place, and a name that they do not declare is an error.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension

CSRC = Path(__file__).resolve().parent
GLIBC = "2.28"
ARCHITECTURES = ("x86_64", "aarch64")
# All that anyone else may call; extension.py does.
EXPORTED = "{ global: unisd_cpu_isa; local: *; };\n"
# Where torch declares the C functions of its stable ABI.
HEADERS = ("torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h")


def platform_tag(architecture: str) -> str:
    return f"manylinux_{GLIBC.replace('.', '_')}_{architecture}"


def compiler(architecture: str) -> list[str]:
    """Command of the C++ compiler.

    Raises:
        FileNotFoundError: ziglang is not installed.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise FileNotFoundError(
            f"ziglang, whose compiler makes wheels for other machines, is not installed for {sys.executable}: "
            "pip install ziglang, and build with --no-build-isolation"
        )
    return [sys.executable, "-m", "ziglang", "c++", "-target", f"{architecture}-linux-gnu.{GLIBC}"]


def torch_functions(include: Path) -> list[str]:
    """Names of the C functions that torch's headers in `include` declare for extensions."""
    declared: set[str] = set()
    for header in HEADERS:
        text = (include / header).read_text()
        declared.update(re.findall(r"AOTI_TORCH_EXPORT[^;(]*?\b((?:aoti_)?torch_\w+)\s*\(", text))
    return sorted(declared)


def build(extension: Extension, output: Path, architecture: str) -> None:
    """Compile and link `extension` into `output`, stripped.

    Raises:
        FileNotFoundError: ziglang is not installed.
        RuntimeError: the compiler failed; the message is its own.
    """
    command = compiler(architecture)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        functions = torch_functions(Path(extension.include_dirs[0]))
        (folder / "torch.c").write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
        (folder / "exported.map").write_text(EXPORTED)
        as_c = [*command[:3], "cc", *command[4:]]
        run([*as_c, "-shared", "-O1", "-Wl,-soname,libtorch_cpu.so", "-o", "libtorch_cpu.so", "torch.c"], folder)
        sources = [str(Path(source).resolve()) for source in extension.sources]
        options = [*extension.extra_compile_args, *(f"-D{name}={value}" for name, value in extension.define_macros)]
        # Messages name the file that they come from: as it lies in the sources, wherever those are.
        for path in (CSRC.parent, *extension.include_dirs):
            options.append(f"-ffile-prefix-map={path}/=")
        options += [f"-I{path}" for path in extension.include_dirs]
        link = ["-shared", "-fPIC", "-s", "-Wl,-z,defs", "-Wl,--version-script=exported.map", "-L.", "-ltorch_cpu"]
        run([*command, *options, *sources, *link, "-o", str(output.resolve())], folder)


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, end="", file=sys.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:4])} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
