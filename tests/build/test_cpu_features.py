"""What cpu_features.h asks of the processor, against the kernel's list, and the set that the library then chooses."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build.processor import CPUINFO, fastest, listed
from unisd_kernels.backends import extension

PROBE = Path(__file__).parent / "kernels" / "features.cpp"
GXX = shutil.which("g++")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(), reason="cpuid is x86-64's, /proc/cpuinfo is Linux's"
)


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    if GXX is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("features") / "features"
    # Nothing of the host's processor in the options: it must be asked at run time.
    subprocess.run([GXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", str(PROBE), "-o", str(program)], check=True)
    return program


def test_the_features_are_those_the_kernel_lists(probe: Path):
    printed = subprocess.run([str(probe)], check=True, capture_output=True, text=True).stdout
    found = set(printed.split())
    # A kernel may list tiles whose state it does not keep.
    assert found - {"amx_bf16"} == listed() - {"amx_bf16"}
    assert found <= listed()
    granted = subprocess.run([str(probe), "amx"], check=True, capture_output=True, text=True).stdout
    if "amx_bf16" in found:
        assert granted == "granted\n"
    if "amx_bf16" not in listed():
        assert granted == "refused\n"


@pytest.mark.skipif(extension.cpu_unavailable() is not None, reason="the compiled library is not there")
def test_the_fastest_set_is_chosen():
    script = "from unisd_kernels.backends import extension; print(extension.cpu_isa())"
    environment = {name: value for name, value in os.environ.items() if name != "UNISD_CPU_ISA"}
    chosen = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert chosen.stdout == f"{fastest()}\n"
