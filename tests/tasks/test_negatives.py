"""Wrong answers: what a model is asked for, which replies are taken, and that none is the right one."""

import json

import pytest

from tests.tasks import rows
from unisd.tasks import Rejected, make_task, read_rows


def example_of(row):
    return read_rows([row], shuffle_choices=False).examples[0]


OPEN, CHOICE, CODE = example_of(rows.OPEN[0]), example_of(rows.COS_E), example_of(rows.MBPP)
TOOLS, SECOND, _ = read_rows([rows.TOOLS]).examples
TASKS = {name: make_task(name, unsafe_code=True) for name in ("open", "choice", "code", "tools")}
WHY = "A kite needs a dark and quiet room."


def fence(code):
    return f"Sure!\n```python\n{code}\n```\nDone."


def calls(*pairs):
    return [{"Action": name, "Action_Input": arguments} for name, arguments in pairs]


TAKEN = [
    ("open", OPEN, '{"answer": "Brell is its capital."}', "Brell is its capital."),
    ("open", OPEN, '```json\n{"answer": "Brell."}\n```\nI hope this helps', "Brell."),
    ("open", OPEN, "Wrong answer: It has none.", "It has none."),
    ("choice", CHOICE, json.dumps({"reasoning": WHY, "answer": "A"}), f"Reasoning: {WHY}\nAnswer: A"),
    ("choice", CHOICE, json.dumps({"reasoning": WHY, "answer": "(C) under water"}), f"Reasoning: {WHY}\nAnswer: C"),
    ("choice", CHOICE, json.dumps({"reasoning": WHY, "answer": "In a cellar"}), f"Reasoning: {WHY}\nAnswer: A"),
    ("choice", CHOICE, f"Reasoning: {WHY}\nAnswer: A", f"Reasoning: {WHY}\nAnswer: A"),
    ("code", CODE, fence("def add_one(n):\n    return n"), "def add_one(n):\n    return n"),
    ("code", CODE, json.dumps({"answer": "def add_one(n):\n    return n"}), "def add_one(n):\n    return n"),
    ("code", CODE, fence("def add_one(n):\n    return n / 0"), "def add_one(n):\n    return n / 0"),
]


@pytest.mark.parametrize(("kind", "example", "reply", "wrong"), TAKEN)
def test_replies_that_are_taken(kind, example, reply, wrong):
    assert TASKS[kind].read_negative(example, 0, reply) == wrong


GOLD_CALL = ("findLamp", {"room": "hall"})
WRONG_CALLS = calls(GOLD_CALL, ("switchLamp", {"lampId": "1", "on": False}))


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps({"reasoning": "r", "answer": WRONG_CALLS}),
        json.dumps(WRONG_CALLS),
        'Thought: r\nAction: findLamp\nAction Input: {}\nAction: switchLamp\nAction Input: {"on": true}\n',
    ],
)
def test_calls_become_a_trace(reply):
    wrong = TASKS["tools"].read_negative(TOOLS, 0, reply)
    assert wrong.startswith("Thought: ")
    assert [line.partition(": ")[2] for line in wrong.splitlines() if line.startswith("Action:")] == [
        "findLamp",
        "switchLamp",
    ]


REFUSED = [
    ("open", OPEN, "", "no answer"),
    ("open", OPEN, '{"text": "x"}', "no answer"),
    ("open", OPEN, '{"answer": "It was cut', "broken JSON"),
    ("open", OPEN, '{"answer": "<the wrong answer>"}', "repeats the request"),
    ("open", OPEN, "velm IS its  capital", "the right one"),
    ("open", OPEN, "I think that Velm is its capital, or not.", "holds the right one"),
    ("open", OPEN, "Velm", "a part of the right one"),
    ("open", OPEN, OPEN.question, "is the question"),
    ("choice", CHOICE, json.dumps({"reasoning": WHY, "answer": "B"}), "the right one"),
    ("choice", CHOICE, json.dumps({"reasoning": WHY, "answer": "in the wind"}), "the right one"),
    ("choice", CHOICE, json.dumps({"reasoning": WHY, "answer": "D"}), "not one of the choices"),
    ("choice", CHOICE, json.dumps({"reasoning": f"{WHY} So the answer is B.", "answer": "A"}), "argues for the right"),
    ("choice", CHOICE, json.dumps({"reasoning": "<two to four sentences>", "answer": "A"}), "no reasoning"),
    ("choice", CHOICE, f"{WHY} The answer is a dark room.", "names no choice"),
    ("code", CODE, "I would rather not.", "no code that parses"),
    ("code", CODE, fence("def add_two(n):\n    return n + 2"), "does not define the function"),
    ("code", CODE, fence(CODE.answer), "is the reference"),
    ("code", CODE, fence("def add_one(n):\n    return 1 + n"), "passes every test"),
    ("tools", TOOLS, "no", "no calls"),
    ("tools", TOOLS, json.dumps(calls(("burnLamp", {}))), "does not exist"),
    ("tools", TOOLS, json.dumps(calls(("findLamp", "{"))), "not JSON"),
    ("tools", TOOLS, json.dumps(calls(("findLamp", [1]))), "not a JSON object"),
    ("tools", TOOLS, json.dumps(calls(GOLD_CALL)), "the right ones"),
    ("tools", TOOLS, json.dumps(calls(("findLamp", {"floor": None, "room": "Hall "}))), "the right ones"),
]


@pytest.mark.parametrize(("kind", "example", "reply", "reason"), REFUSED)
def test_replies_that_are_refused_with_a_reason_that_holds_no_content(kind, example, reply, reason):
    with pytest.raises(Rejected, match=reason) as caught:
        TASKS[kind].read_negative(example, 0, reply)
    assert not any(word in str(caught.value) for word in ("Velm", "kite", "add_", "Lamp"))


def test_code_that_does_not_end_is_refused():
    task = make_task("code", unsafe_code=True)
    task._sandbox.seconds = 0.5
    with pytest.raises(Rejected, match="does not end"):
        task.read_negative(CODE, 0, fence("def add_one(n):\n    while True: pass"))


def test_many_replies_keep_their_places():
    replies = [fence(f"def add_one(n):\n    return n + {step}") for step in (1, 2, 1, 3)]
    held = TASKS["code"].read_negatives([(CODE, place, reply) for place, reply in enumerate(replies)])
    assert [isinstance(one, Rejected) for one in held] == [True, False, True, False]
    assert held[3].endswith("n + 3")


@pytest.mark.parametrize(("gold", "wrong"), [("5", "-5"), ("-5", "5"), ("3.5", "5"), ("<", ">")])
def test_signs_and_points_make_another_answer(gold, wrong):
    example = example_of({"question": "How much?", "answer": gold})
    assert TASKS["open"].read_negative(example, 0, wrong) == wrong


def test_four_requests_differ_and_wrong_letters_take_turns():
    for kind, example in (("open", OPEN), ("code", CODE), ("tools", TOOLS)):
        assert len({TASKS[kind].negative_request(example, place) for place in range(4)}) == 4
    named = [TASKS["choice"].negative_request(CHOICE, place).rpartition('"answer": "')[2][0] for place in range(4)]
    assert named == ["A", "C", "A", "C"]
