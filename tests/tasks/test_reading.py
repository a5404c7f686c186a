"""Rows in every format: what is read of them, and why some are not."""

import json
from pathlib import Path
from random import Random

import pytest

from tests.tasks import rows
from unisd.tasks import Columns, kind_of, make_task, read_rows

DATA = Path(__file__).parents[3] / "shared" / "data"


def one(row, **options):
    reading = read_rows([row], **options)
    assert not reading.rejected
    return reading.examples[0]


def reason(row, **options):
    reading = read_rows([row], **options)
    assert not reading.examples
    [(text, count)] = reading.rejected.items()
    assert count == 1
    return text


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (rows.OPEN[0], "open"),
        (rows.COS_E, "choice"),
        (rows.GPQA, "choice"),
        (rows.MBPP, "code"),
        (rows.HUMANEVAL, "code"),
        (rows.TOOLS, "tools"),
    ],
)
def test_the_kind_is_told_from_the_columns(row, kind):
    assert kind_of(Columns(), row) == kind
    assert read_rows([row]).task.name == kind


def test_questions_and_answers_under_their_own_names():
    example = one({"Frage": "q?", "Antwort": "a", "id": 3}, columns=Columns(prompt="Frage", answer="Antwort"))
    assert (example.question, example.prompt, example.answer, example.demonstration) == ("q?", "q?", "a", "a")


def test_usual_names_however_they_are_written():
    """In capitals, or with the blanks of a first line "Question, Answer"; as they are usually written comes first."""
    example = one({"QUESTION": "q?", " Answer": "a"})
    assert (example.question, example.answer) == ("q?", "a")
    example = one({"Prompt": "no", "query": "q?", "ANSWER": "no", "answer": "a"})
    assert (example.question, example.answer) == ("q?", "a")


def test_messages():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q?"}]
    example = one({"prompt": turns, "completion": [{"role": "assistant", "content": "a"}]})
    assert (example.question, example.prompt, example.answer) == ("q?", turns, "a")
    assert one({"messages": [*turns, {"role": "assistant", "content": "a"}]}).prompt == turns


@pytest.mark.parametrize(
    ("row", "flag"),
    [({"thing": "q", "answer": "a"}, "--prompt_column"), ({"question": "q", "x": "a"}, "--answer_column")],
)
def test_a_column_that_cannot_be_told_is_asked_for(row, flag):
    with pytest.raises(ValueError, match=rf"{'|'.join(map(repr, row))}.*{flag}"):
        read_rows([row])


def test_a_named_column_that_is_not_there():
    with pytest.raises(ValueError, match=r"no column 'q'.*'question', 'answer'"):
        read_rows([rows.OPEN[0]], Columns(prompt="q"))


@pytest.mark.parametrize("row", [rows.SCIENCE, rows.COS_E])
def test_choices_are_shuffled_by_seed_and_number(row):
    for number, example in enumerate(read_rows([row] * 5, seed=7).examples):
        order = list(row["choices"])
        Random(7 + number).shuffle(order)
        assert list(example.choices) == order
        assert example.choices["ABC".index(example.answer)] == "in the wind"
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABC", order, strict=True)]
        assert "\n".join(lines) in example.prompt
        assert example.demonstration == f"Reasoning: {example.explanation}\nAnswer: {example.answer}"
    assert one(row, shuffle_choices=False).answer == "B"


def test_context_and_explanation_of_scienceqa():
    example = one(rows.SCIENCE)
    assert "Kites are light.\nWind lifts." in example.prompt
    assert "Wind lifts the kite." not in example.prompt
    assert example.explanation == "Wind lifts the kite."


def test_gpqa():
    example = one(rows.GPQA)
    assert sorted(example.choices) == ["blip", "mond", "quorn", "zark"]
    assert example.choices["ABCD".index(example.answer)] == "quorn"


@pytest.mark.parametrize("answer", ["B", "(b)", "In the wind.", 1])
def test_ways_to_name_the_right_choice(answer):
    assert one({**rows.CHOICE, "answer": answer}, shuffle_choices=False).answer == "B"


def test_labelled_choices():
    choices = {"text": ["hot", "cold"], "label": ["1", "2"]}
    assert one({"question": "Ice is?", "choices": choices, "answer": "2"}, shuffle_choices=False).answer == "B"


def test_mbpp_is_renamed_to_what_the_tests_call():
    example = one(rows.MBPP)
    assert example.answer == "import math\ndef add_one(n):\n    return n + 1"
    assert "`add_one(n)`" in example.prompt
    assert all(test in example.prompt for test in example.tests)
    assert "return" not in example.prompt


@pytest.mark.parametrize("row", [rows.MBPP, rows.SANITIZED, rows.HUMANEVAL])
def test_reference_code_passes_its_own_tests(row):
    task = make_task("code", unsafe_code=True)
    example = one(row)
    broken = {**row, **{name: row[name].replace("return", "return not") for name in row if name[:2] in ("co", "ca")}}
    right, wrong = task.faults([example, one(broken)])
    assert right is None
    assert "does not pass its tests" in str(wrong)


def test_humaneval():
    example = one(rows.HUMANEVAL)
    assert rows.HUMANEVAL["prompt"].strip() in example.prompt
    assert "sum(xs)" not in example.prompt
    assert example.demonstration == rows.HUMANEVAL["prompt"] + rows.HUMANEVAL["canonical_solution"]


def test_toolalpaca_has_a_row_for_each_instruction():
    reading = read_rows([rows.TOOLS])
    assert [example.question for example in reading.examples] == rows.TOOLS["Instructions"]
    first, second, asking = reading.examples
    assert "findLamp: Find a lamp." in first.prompt
    assert "components" not in first.prompt
    assert first.prompt.endswith("Response:")
    assert first.demonstration.startswith("Thought: ")
    inputs = [json.loads(line.partition(": ")[2]) for line in second.demonstration.splitlines() if "Input" in line]
    assert inputs == [{"room": "hall"}, {"lampId": "${lampId from findLamp}", "on": True}]
    assert "getDetails" in asking.demonstration
    assert "getDetails: " in first.prompt


def tool_row(**call):
    return {**rows.TOOLS, "Instructions": ["Do."], "Golden_Answers": [[call] if call else []]}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"room": ${a room}}', {"room": "${a room}"}),
        ('{"room": ${a room}"}', {"room": "${a room}"}),  # as one published row has it
        ('{"room": "${a}", "ids": [${one}, ${two}]}', {"room": "${a}", "ids": ["${one}", "${two}"]}),
        ('{"room": "next to ${a room}"}', {"room": "next to ${a room}"}),
    ],
)
def test_values_of_earlier_calls(written, read):
    (example,) = read_rows([tool_row(Action="findLamp", Action_Input=written)]).examples
    assert example.details["calls"] == [("findLamp", read)]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": " ", "answer": "a"}, "the question is empty"),
        ({"question": "q", "answer": None}, "the answer is empty"),
        ({"question": {"a": 1}, "answer": "a"}, "holds dict, not a text"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": "a"}, "does not end with the user's message"),
        ({**rows.SCIENCE, "image": b"png"}, "comes with an image"),
        ({**rows.CHOICE, "answer": "in a box"}, "not one of the choices"),
        ({**rows.CHOICE, "answer": 3}, "not one of the choices"),
        ({**rows.CHOICE, "choices": ["x", "x"], "answer": 0}, "two choices are the same"),
        ({**rows.CHOICE, "choices": ["x", ""], "answer": 0}, "a choice is empty"),
        ({**rows.CHOICE, "choices": ["x"], "answer": 0}, "no list of 2 to"),
        ({**rows.MBPP, "code": "def plus(n: return"}, "does not parse"),
        ({**rows.MBPP, "code": "n = 1"}, "defines no function"),
        ({**rows.MBPP, "test_list": []}, "there are no tests"),
        ({**rows.MBPP, "test_list": ["assert True"]}, "call no function"),
        ({**rows.HUMANEVAL, "entry_point": "other"}, "does not define the function"),
        (tool_row(), "no gold call"),
        (tool_row(Action="findLamp", Action_Input='{"room": '), "JSON arguments"),
        (tool_row(Action="burnLamp", Action_Input="{}"), "not documented"),
    ],
)
def test_rows_that_cannot_be_used_are_counted_with_a_reason_that_holds_no_content(row, text):
    given = reason(row)
    assert text in given
    assert not any(word in given for word in ("box", "Lamp", "plus", "assert"))


@pytest.mark.skipif(not DATA.is_dir(), reason="the slices of real data are not there")
def test_real_slices():
    counts = {}
    for path in DATA.glob("*.json*"):
        text = path.read_text()
        raw = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        reading = read_rows(raw)
        counts[reading.task.name, path.name] = (len(reading.examples), sum(reading.rejected.values()))
    assert counts == {
        ("choice", "scienceqa_train_600.jsonl"): (600, 0),
        ("choice", "scienceqa_test_100.jsonl"): (100, 0),
        ("choice", "cos_e_train_2000.jsonl"): (2000, 0),
        ("choice", "cos_e_validation_300.jsonl"): (300, 0),
        ("code", "mbpp_train_validation.jsonl"): (474, 0),
        ("code", "mbpp_test_100.jsonl"): (100, 0),
        ("tools", "toolalpaca_eval_simulated.json"): (100, 0),
    }
