"""A base model without a chat template can be evaluated too: messages are read as plain text."""

import copy

import pytest

from tests.evaluation.conftest import make_model
from unisd.cli import main
from unisd.turns import readable


def test_messages_as_text(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello?"}]
    assert readable(tokenizer, messages) is messages
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert readable(bare, messages) == "be brief\nhello?\n"
    assert readable(bare, "text") == "text"


@pytest.mark.parametrize(
    "words",
    [
        ["procedural", "--count", "2", "--steps", "1"],
        ["diagnostic", "--count", "2", "--steps", "1"],
        ["retention", "--base", "{base}"],
        ["drift", "--base", "{base}", "--max_new_tokens", "2"],
        ["behaviour"],
    ],
    ids=lambda words: words[0],
)
def test_every_evaluation(words, tokenizer, tmp_path, capsys):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for name in ("model", "base"):
        make_model(1).save_pretrained(tmp_path / name)
        bare.save_pretrained(tmp_path / name)
    given = [word.replace("{base}", str(tmp_path / "base")) for word in words]
    assert main(["eval", *given, "--model", str(tmp_path / "model"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out
