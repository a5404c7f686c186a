"""The wheel: both packages, typed markers, licence, the command, nothing else; and the objects of its library."""

from __future__ import annotations

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

ROOT = Path(__file__).parents[2]
# Quicker, and as good where the build ends before torch matters.
NO_ISOLATION = "--no-build-isolation"


def copy_source(target: Path) -> Path:
    source = target / "source"
    for name in ("unisd_kernels", "unisd", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def build_wheel(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *options, "-w", str(tmp_path)]
    return subprocess.run(
        [*command, str(copy_source(tmp_path))],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture
def built(built_once) -> Path:
    """Folder of a build as people type it: no flag, so that pip builds in an environment that has no torch."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")

    def build(folder: Path) -> None:
        done = build_wheel(folder, UNISD_BUILD="")
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "printed.txt").write_text(done.stdout + done.stderr)

    return built_once("wheel", build)


@pytest.mark.exhaustive  # compiles the library for a minute
def test_the_wheel_has_the_library_and_fits_every_python(built: Path, tmp_path: Path):
    assert f"built with the headers of {Path(torch.__file__).parent}" in (built / "printed.txt").read_text()
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith("unisd_kernels-0.1.0-cp310-abi3-")
    with zipfile.ZipFile(wheel) as archive:
        assert "unisd_kernels/_C.abi3.so" in archive.namelist()
        archive.extractall(tmp_path / "installed")
    script = (
        "import unisd_kernels; from unisd_kernels.backends import extension; "
        "print(unisd_kernels.__file__, extension.cpu_isa(), unisd_kernels.available('cpu')['native'])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert loaded.stdout.startswith(str(tmp_path / "installed"))
    assert loaded.stdout.endswith("True\n")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the vector instruction sets are x86-64's")
@pytest.mark.exhaustive  # compiles the library for a minute
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_symbol_is_shared_between_instruction_sets(isa: str, built: Path):
    """The linker keeps one of several weak definitions of the same function. If it were the one for a wide instruction
    set, a processor without that would stop at an illegal instruction."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    (compiled,) = (built / "source" / "build").rglob(f"isa_{isa}.o")
    listed = subprocess.run(["nm", "--defined-only", str(compiled)], check=True, capture_output=True, text=True)
    symbols = [line.split()[-2:] for line in listed.stdout.splitlines()]
    assert any("kernels" in name for _, name in symbols)
    own = re.compile(rf"_Z(GVZ|Z|TV|TI|TS)?NK?5unisd{len(isa)}{isa}")
    shared = [name for kind, name in symbols if kind in "WVuwv" and not own.match(name)]
    assert [name for name in shared if name != "DW.ref.__gxx_personality_v0"] == []
    # Nor may a strong one outside of the namespace clash, or be found by the name of another set.
    strong = [name for kind, name in symbols if kind in "TDBRG" and not own.match(name)]
    assert strong == []


def test_without_a_compiler_the_package_installs_and_says_what_is_lost(tmp_path: Path):
    # A compiler that fails stands for none: it reaches further.
    done = build_wheel(tmp_path, NO_ISOLATION, CXX="false", CC="false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the package works without its compiled library" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_a_build_that_was_asked_for_fails_without_a_compiler(tmp_path: Path):
    done = build_wheel(tmp_path, NO_ISOLATION, UNISD_BUILD="cpu", CXX="false", CC="false")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


def test_an_unknown_build_is_refused(tmp_path: Path):
    done = build_wheel(tmp_path, NO_ISOLATION, UNISD_BUILD="gpu")
    assert done.returncode != 0
    assert (
        "UNISD_BUILD must be one of none, cpu, cuda, manylinux_x86_64, manylinux_aarch64, or unset, got 'gpu'"
        in done.stdout + done.stderr
    )


def test_contents(tmp_path: Path):
    done = build_wheel(tmp_path, NO_ISOLATION, UNISD_BUILD="none")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "unisd_kernels-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    for name in ("unisd_kernels/__init__.py", "unisd_kernels/py.typed", "unisd/trainer.py", "unisd/py.typed"):
        assert name in names
    assert any(name.endswith("LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"unisd_kernels", "unisd"}
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.10"]
    assert "License-Expression: Apache-2.0" in text
