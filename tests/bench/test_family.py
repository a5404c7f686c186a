"""`python -m bench family`: a model is evaluated, trained and evaluated again, and what came of it is kept."""

from __future__ import annotations

import json
import types

import pytest

from bench.__main__ import main
from bench.studies import family
from tests.evaluation.conftest import make_model, tokenizer  # noqa: F401
from tests.tasks.rows import COS_E
from unisd.cli import main as unisd
from unisd.cli.errors import CommandError


def test_before_and_after(tmp_path, monkeypatch, tokenizer, capsys):  # noqa: F811
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    base, rows, output = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "result.json"
    make_model(0).save_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    rows.write_text("".join(json.dumps({**COS_E, "question": f"Where does kite {n} fly?"}) + "\n" for n in range(4)))

    run = family.subprocess.run

    def in_this_process(command, **options):
        if command[1:3] != ["-m", "unisd"]:
            return run(command, **options)
        return types.SimpleNamespace(returncode=unisd(command[3:]), stderr="one line\nas the command said")

    monkeypatch.setattr(family.subprocess, "run", in_this_process)
    options = ["--model", base, "--train", rows, "--test", rows, "--steps", "2", "--limit", "3", "--new_tokens", "4"]
    options = [*map(str, options), "--work", str(tmp_path / "work"), "--output", str(output)]
    assert main(["family", *options]) == 0
    result = json.loads(output.read_text())
    assert len(result["trained"]["losses"]) == 2
    assert result["trained"]["peak_memory_gib"] > 0
    for one in (result["before"], result["after"]):
        assert one["items"] == one["scores"]["likelihood"]["count"] == 3
        assert one["versions"]["torch"]
    assert result["options"]["test"] == "rows.jsonl"
    assert str(tmp_path) not in json.dumps(result["options"])
    assert (tmp_path / "work" / "before" / "cos_e.json").is_file()
    capsys.readouterr()
    with pytest.raises(CommandError, match="unisd eval failed: as the command said"):
        main(["family", *options, "--test", str(tmp_path / "absent.jsonl")])
