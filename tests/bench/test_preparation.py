"""`python -m bench preparation`: what a preparation reports of itself, and that its synthetic rows differ."""

import json

import pytest

from bench.__main__ import main
from bench.studies.preparation import synthetic
from tests.trainer import tiny_run


@pytest.mark.exhaustive  # a process that imports everything
def test_what_it_took_and_what_was_kept(tmp_path, capsys):
    tiny_run.llama().save_pretrained(tmp_path / "model")
    tiny_run.tokenizer().save_pretrained(tmp_path / "model")
    output = tmp_path / "result.json"
    options = ["--contexts", "random", "--model", str(tmp_path / "model"), "--output", str(output)]
    assert main(["preparation", "--rows", "30", *options]) == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert (run["file"], run["read"], run["kept"]) == ("synthetic_30.jsonl", 30, 30)
    assert run["peak_memory_gib"] > 0
    assert sum(run["seconds"].values()) < run["command_seconds"]
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "what?"}\n')
    with pytest.raises(RuntimeError, match=r"unisd prepare broken\.jsonl failed: unisd"):
        main(["preparation", str(broken), *options])


def test_no_two_questions_are_alike():
    assert len({row["question"] for row in synthetic(5000)}) == 5000
