"""Scores of replies to tiny rows of every kind."""

import json

import pytest

from tests.tasks.rows import COS_E, GPQA, HUMANEVAL, MBPP, OPEN, SANITIZED, SCIENCE, TOOLS
from unisd.scoring import MEASURES, score_replies
from unisd.tasks import read_rows


def scored(rows, reply, unsafe_code=True, **kind):
    reading = read_rows(rows, **kind)
    replies = [reply(example) for example in reading.examples]
    found = score_replies(reading.task.name, reading.examples, replies, unsafe_code=unsafe_code)
    assert all(set(each.values) == set(MEASURES[reading.task.name]) for each in found)
    return reading.examples, found


def fenced(code):
    return f"Here:\n```python\n{code}\n```\nDone."


@pytest.mark.parametrize("rows", [[SCIENCE], [COS_E], [GPQA], [TOOLS], [MBPP], [SANITIZED], [HUMANEVAL], OPEN], ids=str)
def test_gold_answers_are_right(rows):
    def gold(example):
        return fenced(example.demonstration) if example.tests else example.demonstration

    examples, found = scored(rows, gold)
    assert len(examples) == len(found) >= 1
    for each in found:
        assert each.values.pop("timed_out", 0.0) == 0.0
        assert set(each.values.values()) == {1.0}, each


def test_another_letter_is_wrong():
    _, (found,) = scored([COS_E], lambda example: "Answer: " + next(x for x in "ABC" if x != example.answer))
    assert found.values == {"strict": 0.0, "lenient": 0.0, "strict_extracted": 1.0, "lenient_extracted": 1.0}
    _, (found,) = scored([COS_E], lambda example: f"the answer is {example.answer}, I think")
    assert found.values == {"strict": 0.0, "lenient": 1.0, "strict_extracted": 0.0, "lenient_extracted": 1.0}


@pytest.mark.parametrize(
    ("reply", "passes", "has_format", "found"),
    [
        ("```\ndef add_one(n):\n    return n + 1\n```", 1, 1, "passed"),
        ("def add_one(n):\n    return n + 1", 1, 1, "passed"),
        ("add_one = lambda n: n + 1", 1, 1, "passed"),
        ("```python\ndef add_one(n):\n    return n + 2\n```", 0, 1, "failed AssertionError"),
        ("```python\ndef add_one(n):\n    return missing\n```", 0, 1, "crashed NameError"),
        ("```python\ndef plus(n):\n    return n + 1\n```", 0, 0, "no code"),
        ("I would add one to n.", 0, 0, "no code"),
        ("```python\ndef add_one(n:\n```", 0, 0, "no code"),
        ("", 0, 0, "no code"),
    ],
)
def test_code(reply, passes, has_format, found):
    _, (score,) = scored([MBPP], lambda _: reply)
    assert score.values == {"pass@1": passes, "format": has_format, "timed_out": 0.0}
    assert score.found.startswith(found.split()[0])


def test_code_that_does_not_end(monkeypatch):
    from unisd.scoring import score

    class Hasty(score.Sandbox):
        def __init__(self, unsafe_code):
            super().__init__(unsafe_code, seconds=0.7)

    monkeypatch.setattr(score, "Sandbox", Hasty)
    _, (found,) = scored([MBPP], lambda _: "def add_one(n):\n    while True: pass")
    assert found.values == {"pass@1": 0.0, "format": 1.0, "timed_out": 1.0}


def calls(*named):
    return "\n".join(f"Thought: so.\nAction: {name}\nAction Input: {json.dumps(given)}" for name, given in named)


FIND, SWITCH = ("findLamp", {"room": "Hall "}), ("switchLamp", {"lampId": "${id}", "on": "True"})


@pytest.mark.parametrize(
    ("reply", "action", "arguments"),
    [
        (calls(FIND, SWITCH), 1, 1),
        (calls(FIND, SWITCH, ("findLamp", {})), 1, 1),  # which is optional
        (calls(FIND, ("switchLamp", {"lampId": "7", "on": True})), 1, 0.75),
        (calls(("findLamp", {"room": "attic"}), ("switchLamp", {})), 1, 0),
        (calls(SWITCH, FIND), 0, 0),
        (calls(FIND), 0, 0),
        (calls(FIND, SWITCH, SWITCH), 0, 0),
        (calls(FIND, SWITCH, ("findLamp", {}), ("findLamp", {})), 0, 0),
        ("I cannot.", 0, 0),
        ("Action: findLamp\nAction Input: [1]", 0, 0),
    ],
)
def test_calls(reply, action, arguments):
    _, found = scored([TOOLS], lambda _: reply)
    assert found[1].values == {
        "action": action,
        "arguments": pytest.approx(arguments),
        "full": float(arguments == 1),
        "extracted": float("{" in reply),
    }


def test_an_argument_without_gold_value_is_not_counted():
    _, found = scored([TOOLS], lambda _: calls(("findLamp", {"room": "hall", "floor": 3})))
    assert found[0].values["full"] == 1.0


def test_what_cannot_be_scored_is_refused():
    examples = read_rows([COS_E]).examples
    with pytest.raises(ValueError, match="kind must be one of open, choice, code, tools, got 'poetry'"):
        score_replies("poetry", examples, [""])
    with pytest.raises(ValueError, match="got 1 examples and 2 replies"):
        score_replies("choice", examples, ["", ""])
