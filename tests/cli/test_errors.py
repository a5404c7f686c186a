"""A user's mistake is a line or two on stderr and exit status 2; a fault of the program keeps its traceback."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from unisd.cli import main
from unisd.cli.errors import CommandError, run, setting_up


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says on stderr, having failed as it should."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert 1 <= len(lines) <= 2
    assert all(len(line) < 500 for line in lines)
    assert lines[0].startswith(f"unisd {arguments[0]}: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train --learning_rat 1", "there is no --learning_rat; did you mean --learning_rate"),
        ("train --learning-rat=1", "did you mean --learning_rate"),
        ("train --learning_r 1", "did you mean --learning_rate"),  # no abbreviations
        ("train --learning_rate abc", "invalid float value: 'abc'"),
        ("train --max_steps 1e3", "invalid int value: '1e3'"),
        ("train --preset unisd", "preset must be one of"),
        ("train --eval_strategy sometimes", "'sometimes' is not one of no, steps, epoch"),
        ("train --config nowhere.yaml", "there is no such file"),
        ("train stray", "'stray' belongs to no flag"),
        ("train --model_name_or_path ./nowhere --output_dir {tmp}/a", "'./nowhere' is not a folder here"),
        ("train --dataset {tmp}/a.jsonl.gz --output_dir {tmp}/a", "a.jsonl.gz: there is no such file"),
        ("train --output_dir {tmp}/file/a", "cannot be written to (Not a directory): give another --output_dir"),
        ("prepare {tmp}/file -o {tmp}/file/a", "cannot be written to (File exists): give another -o FOLDER"),
        ("eval --devcie cpu", "there is no --devcie; did you mean --device?"),
        ("eval prodecural", "did you mean procedural?"),
        ("eval procedural --count x", "must be a whole number >= 1, got 'x'"),
        ("eval procedural --count 0", "must be a whole number >= 1, got '0'"),
        ("eval procedural --model ./nowhere", "'./nowhere' is not a folder here"),
        ("eval procedural --model {tmp}", ""),  # transformers' own words
        ("eval procedural --dtype half", "'half' is not one of auto, float32, bfloat16, float16"),
        ("eval procedural --device abacus", "--device abacus: there is no such device here"),
        ("eval retention --count 3", "--count has no effect with retention"),
        ("eval procedural --base x", "--base has no effect with procedural"),
        ("doctor --divice cpu", "there is no --divice; did you mean --device?"),
        ("doctor --device abacus", "there is no such device here"),
        ("demo --optimiser-steps 1", "did you mean --optimizer-steps?"),
        ("demo --optimizer-steps x", "must be a whole number >= 1, got 'x'"),
        ("demo --learning-rate -1", "must be a number above 0, got '-1'"),
        ("demo --preset unisd", "did you mean unisd_star?"),
        ("bench --rouns 1", "there is no --rouns; did you mean --rounds"),
        ("bench --rounds x", "invalid int value: 'x'"),
        ("bench --case nothing", "no case 'nothing'"),
    ],
)
def test_a_mistake_is_a_line(arguments: str, said: str, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert said in refusal(capsys, *arguments.format(tmp=tmp_path).split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "there is no setting 'learning_rat'; did you mean learning_rate?"),
        ("learning_rate: abc", "invalid float value: 'abc'"),
        ("learning_rate: [1, 2]", "learning_rate takes one value, got the list [1, 2]"),
        ("learning_rate: {a: 1}", "learning_rate cannot be a mapping"),
        ("learning_rate:", "learning_rate has no value"),
        ("procedural_rows: 2.5", "invalid int value: '2.5'"),
        ("dtype: float8", "there is no 'float8'"),
        ("eval_strategy: no", "eval_strategy cannot be False (YAML reads yes, no, on and off as truth values"),
        ("seed: 1\nseed: 2", "'seed' stands twice"),
        ("seed: [1", "is not YAML"),
        ("- seed", "must hold `name: value` lines"),
        ("env: {A: 1}", "set variables in the shell"),
        ("do_train: true", "do_train=True has no effect in unisd train"),
    ],
)
def test_a_mistake_in_a_file_is_a_line_that_names_the_file(text: str, said: str, tmp_path: Path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    line = refusal(capsys, "train", "--config", str(file))
    assert said in line
    assert str(file) in line or "has no effect" in line


def test_an_unknown_command_is_told_with_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_traceback_can_be_asked_for(how: str, monkeypatch):
    flags = ["--traceback"] if how == "flag" else []
    if how == "variable":
        monkeypatch.setenv("UNISD_TRACEBACK", "1")
    with pytest.raises(CommandError, match="learning_rat"):
        main(["train", "--learning_rat", "1", *flags])


def _fails_by_itself() -> int:
    return int("x")


def _calls_a_library_wrongly() -> int:
    import torch

    torch.nn.Linear(2, 2)(torch.zeros(3))
    return 0


def _refuses() -> int:
    from unisd_kernels.config import check_number

    check_number("beta", 2.0, high=1.0)
    return 0


def _refused_by_a_library() -> int:
    import torch

    torch.nn.Dropout(7.0)
    return 0


@pytest.mark.parametrize("fault", [_fails_by_itself, _calls_a_library_wrongly, _refused_by_a_library])
def test_a_fault_keeps_its_traceback(fault):
    with pytest.raises((ValueError, RuntimeError)):
        run("unisd train", fault, traceback=False)


@pytest.mark.parametrize("fault", [_fails_by_itself, _calls_a_library_wrongly])
def test_a_fault_while_setting_up_keeps_its_traceback(fault):
    with pytest.raises((ValueError, RuntimeError)), setting_up():
        fault()


def test_what_this_package_refuses_is_the_users(capsys):
    assert run("unisd train", _refuses, traceback=False) == 2
    assert capsys.readouterr().err == "unisd train: error: beta must be in [-inf, 1], got 2.0\n"


def test_what_a_library_refuses_while_setting_up_is_the_users(capsys):
    def command() -> int:
        with setting_up():
            return _refused_by_a_library()

    assert run("unisd train", command, traceback=False) == 2
    said = capsys.readouterr().err.splitlines()
    assert "dropout probability" in said[0]
    assert said[1] == "(--traceback shows where it comes from)"


def test_a_file_that_cannot_be_written_is_the_users(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")

    def command() -> int:
        with setting_up():
            (tmp_path / "file" / "folder").mkdir(parents=True)
        return 0

    assert run("unisd train", command, traceback=False) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_folder_that_takes_no_file_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch, capsys):
    """Also one that exists; root may write into any, so the system's answer is made up."""

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "(Permission denied): give another --output_dir" in refusal(capsys, "train", "--output_dir", str(tmp_path))
    assert "(Permission denied): give another -o FOLDER" in refusal(capsys, "prepare", "x", "-o", str(tmp_path / "a"))


def test_interrupted(capsys):
    def command() -> int:
        raise KeyboardInterrupt

    assert run("unisd train", command, traceback=False) == 130
    assert "unisd train: interrupted" in capsys.readouterr().err


def test_missing_packages_are_named():
    script = (
        "import sys\nfor name in ('transformers', 'trl', 'peft', 'datasets'): sys.modules[name] = None\n"
        "from unisd.cli import main\nsys.exit(main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not installed: pip install 'unisd-kernels[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_python_m_unisd():
    done = subprocess.run([sys.executable, "-m", "unisd", "doctro"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean doctor?" in done.stderr
