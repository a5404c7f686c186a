"""Evaluations in the model card of a run: behaviour, drift and retention beside the scores."""

import json

from tests.compare.evaluated import write_all
from tests.trainer.tiny_run import lora, trainer
from unisd.compare import runs
from unisd.evaluation.files import write_result
from unisd.run.card_evaluations import update_card


class Scores:
    def as_dict(self):
        share = {"value": 0.5, "low": 0.25, "high": 0.75, "count": 8}
        return {"benchmark": "cos_e", "kind": "choice", "scores": {"strict": share}}

    def completions(self):
        return [{"number": 0, "strict": 1.0}]


def test_an_evaluation_in_the_folder_of_a_run_is_told_in_its_card(tmp_path, monkeypatch):
    trainer(tmp_path, preset="plain", peft_config=lora()).create_model_card()
    card = tmp_path / "README.md"
    first = card.read_text()
    assert "Not evaluated yet: `unisd eval procedural drift retention behaviour" in first
    write_result(tmp_path / "eval" / "cos_e.json", Scores(), {"model": "m"}, {"seconds": 1.0})
    assert json.loads((tmp_path / "eval" / "cos_e.jsonl").read_text()) == {"number": 0, "strict": 1.0}
    text = card.read_text()
    assert "| cos_e | strict | 50.0% [25.0, 75.0] | 8 |" in text
    assert "Not evaluated" not in text
    assert "behaviour probe" not in text
    write_all(tmp_path, shift=6)
    # Replies, of which there may be many, are not read for it.
    monkeypatch.setattr(runs, "_rows", None)
    assert update_card(tmp_path)
    text = card.read_text()
    for line in (
        "| cos_e | strict | 50.0% [25.0, 75.0] | 8 |",
        "| procedural | accuracy | 75.0% [46.8, 91.1] | 12 |",
        "| behaviour | refuses plainly harmful requests | 40.0% [16.8, 68.7] | 10 |",
        "it can show that a habit changed, not that a model is safe",
        "| forward perplexity, own completions | 8 |",
        "| retention: KL on fixed chat, nats a token | 0.12 |",
        "| perplexity of those answers | 9 -> 15 |",
    ):
        assert line in text, line
    # What stands around it stays.
    assert text.partition("<!-- evaluations -->")[0] == first.partition("<!-- evaluations -->")[0]
    assert text.partition("<!-- end of the evaluations -->")[2] == first.partition("<!-- end of the evaluations -->")[2]


def test_other_cards_and_other_folders_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine\n")
    write_result(tmp_path / "eval" / "cos_e.json", Scores(), {}, {})
    write_result(tmp_path / "scores" / "cos_e.json", Scores(), {}, {})
    assert (tmp_path / "README.md").read_text() == "mine\n"
    assert not (tmp_path / "scores" / "README.md").exists()
