"""The help of every command fits a terminal of 80 columns, and says each flag once."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from unisd.cli import COMMANDS, main
from unisd.cli.help import filled


@pytest.mark.parametrize("command", ["", *(name for name in COMMANDS if name != "bench"), "eval mbpp"])
def test_it_fits_eighty_columns(command: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    # argparse ends the process. The settings of `unisd train` are transformers' own too, some of them long.
    with pytest.raises(SystemExit, match="0") if command not in ("", "launch") else nullcontext():
        assert main([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    long = [line for line in lines if len(line) > 80]
    assert not long or (command == "train" and all(line.startswith("  --") for line in long))
    if command == "train":
        assert lines[0] == "usage: unisd train [--config FILE] [--SETTING VALUE ...]"
        assert "    unisd train --dataset questions.jsonl --output_dir runs/mine" in lines
        text = "\n".join(lines)
        assert "  --learning_rate LEARNING_RATE\n" in text
        assert "--learning-rate" not in text
        assert "(default: unisd_star)" in " ".join(text.split())


def test_examples_stay_and_paragraphs_are_filled():
    text = "One two\nthree.\n\n    a command   here \\\n        and more\n\nFour\nfive.\n"
    assert filled(text, 12) == "One two\nthree.\n\n    a command   here \\\n        and more\n\nFour five."
