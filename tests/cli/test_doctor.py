"""`unisd doctor`: says what is there, and fails when the numbers are wrong."""

from __future__ import annotations

import subprocess
import sys

import torch

from unisd.cli import main
from unisd.cli.doctor import self_test


def test_doctor_passes_and_names_what_it_saw(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    for expected in (torch.__version__, "implementations on cpu", "used by default", "all well"):
        assert expected in output


def test_doctor_fails_on_wrong_numbers(monkeypatch, capsys):
    from unisd_kernels.tiles.torch import TorchTiles

    right = TorchTiles.divergence_gradient

    def wrong(self, student, *arguments):
        right(self, student, *arguments)
        student.mul_(1.001)

    monkeypatch.setattr(TorchTiles, "divergence_gradient", wrong)
    assert self_test("torch", torch.device("cpu")) > 1e-4
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_doctor_works_without_the_trainers_packages():
    blocked = "import sys\nfor name in ('transformers', 'trl', 'peft', 'datasets'): sys.modules[name] = None\n"
    script = blocked + "from unisd.cli import main\nsys.exit(main(['doctor', '--device', 'cpu']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_command_and_help(capsys):
    assert main(["distil"]) == 2
    assert "no command 'distil'" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main([]) == 2
