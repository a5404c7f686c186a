"""`unisd doctor`: says what is there, and fails when the numbers are wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from unisd.cli import main
from unisd.cli.doctor import self_test

# In a process of its own, where the trainer's packages are not: it needs none of them.
DOCTOR = """
import sys
for name in ('transformers', 'trl', 'peft', 'datasets'):
    sys.modules[name] = None
from unisd.cli import main
sys.exit(main(['doctor', '--device', 'cpu']))
"""


def test_doctor_passes_and_names_what_it_saw(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    for expected in (
        torch.__version__.partition("+")[0],
        "implementations on cpu",
        "used by default",
        "all well",
        "loaded, runs with",
        "at a time: 100 MiB",
    ):
        assert expected in output


def test_doctor_fails_on_wrong_numbers(monkeypatch, capsys):
    from unisd_kernels.backends.torch import TorchBackend

    right = TorchBackend.divergence_of_logits_backward

    def wrong(self, saved, *arguments):
        right(self, saved, *arguments)
        saved.student.mul_(1.001)

    monkeypatch.setattr(TorchBackend, "divergence_of_logits_backward", wrong)
    assert self_test("torch", torch.device("cpu")) > 1e-4
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("isa", ["scalar", pytest.param("avx2", marks=pytest.mark.exhaustive)])
def test_every_instruction_set_passes_the_self_test(isa):
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2")
    done = subprocess.run(
        [sys.executable, "-c", DOCTOR],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "UNISD_CPU_ISA": isa},
    )
    assert done.returncode == 0, done.stderr
    assert f"loaded, runs with {isa}" in done.stdout
    assert "native          used by default" in done.stdout


def test_a_missing_library_is_reported_with_its_reason():
    absent = "from pathlib import Path\nfrom unisd_kernels.backends import extension as library\n"
    absent += "library._CPU_LIBRARY = Path('absent')\n"
    done = subprocess.run([sys.executable, "-c", absent + DOCTOR], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not loaded: this installation was made without it" in done.stdout
    assert "torch           used by default" in done.stdout


def test_an_instruction_set_that_is_not_there_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "from unisd_kernels import available; available('cpu')"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "UNISD_CPU_ISA": "vliw"},
    )
    assert done.returncode == 1
    assert "UNISD_CPU_ISA='vliw' is not an instruction set of this processor" in done.stderr


def test_unknown_command_and_help(capsys):
    assert main(["distil"]) == 2
    assert "no command 'distil'" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main([]) == 2


def test_the_time_of_compiling_is_told(monkeypatch):
    """Kernels that are compiled at their first call: what that took, against the second."""
    from unisd.cli import doctor

    calls = []
    monkeypatch.setattr(doctor, "self_test", lambda *arguments: calls.append(arguments) or 0.0)
    text = doctor._compile_time("triton", torch.device("cuda"), 12.3)
    assert text.startswith("; first call 12.3 s with compiling, then 0.00 s (compiled code is kept in ")
    assert calls == [("triton", torch.device("cuda"))]
    assert doctor._compile_time("torch", torch.device("cuda"), 12.3) == ""
