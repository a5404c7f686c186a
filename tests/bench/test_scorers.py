"""`python -m bench scorers`: gold answers score 1, others by chance, and mistakes are named."""

import json

import pytest

from bench.__main__ import main
from tests.tasks.rows import COS_E, MBPP
from unisd.cli.errors import CommandError


def test_gold_and_shuffled(tmp_path, capsys):
    rows = [{**COS_E, "question": f"Where does kite {n} fly?"} for n in range(60)]
    choice, code, output = tmp_path / "choice.jsonl", tmp_path / "code.jsonl", tmp_path / "out.json"
    choice.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**COS_E, "answer": "?"}]))
    code.write_text(json.dumps(MBPP) + "\n")
    options = ["--unsafe_code", "--output", str(output)]
    assert main(["scorers", f"cos_e={choice}", f"mbpp={code}", *options]) == 0
    first, second = json.loads(output.read_text())["runs"]
    assert (first["rows"], first["unread"]) == (60, {"the answer is not one of the choices": 1})
    assert first["gold"]["strict"] == second["gold"]["pass@1"] == 1.0
    assert first["shuffled"]["low"] <= first["chance"] <= first["shuffled"]["high"]
    assert 0.25 < first["chance"] < 0.45
    assert second["chance"] is None
    assert "cos_e" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["poems=x.jsonl", "cos_e"])
def test_what_is_no_benchmark_is_refused(given):
    with pytest.raises(CommandError, match="give NAME=FILE with a NAME of arc_challenge, cos_e"):
        main(["scorers", given])
