"""Replies of every kind, made by hand, and what the classifier says of them."""

from decimal import Decimal

import pytest

from tests.data.test_diagnostic import TASK
from unisd.data.diagnostic import diagnostic_tasks
from unisd.scoring.trace import KINDS, execution

GOLD = TASK.gold_trace
STEPS = GOLD.splitlines()[:3]
REPLIES = {
    "exact": GOLD,
    "exact, with words and signs": "So:\nS3 = S2 / S1 = 2.667\n**S4: -1.333**\nS5 = \u22123.555.\n**Answer: $-3.555$**",
    "right": "\n".join([STEPS[0], "S4 = 2.667 - 4 = -1.3", STEPS[2], "Answer: -3.555"]),
    "wrong": "\n".join([*STEPS[:2], "S5 = -1.333 * 2.667 = 3.555", "Answer: 3.555"]),
    "missing": "\n".join(STEPS),
    "missing, nothing at all": "",
    "missing, an answer without a number": "Answer: none",
    "premature": "\n".join(["Answer: -3.555", *STEPS]),
    "premature, in the middle": "\n".join([STEPS[0], "Answer: 7", *STEPS[1:], "Answer: 7"]),
    "under_executed": "\n".join([STEPS[0], "Answer: 2.667"]),
    "under_executed, the answer alone": "Answer: -3.555",
    "under_executed, the task repeated": "\n".join([*TASK.question.splitlines()[:5], "Answer: -3.555"]),
    "over_executed": GOLD.replace("Answer", "S6 = -3.555 + 1 = -2.555\nAnswer"),
    "self_corrected": "\n".join([*STEPS[:2], "S5 = 1 * 1 = 1", STEPS[2], "Answer: -3.555"]),
    "self_corrected, the answer": GOLD + "\nNo.\nAnswer: 4",
}


@pytest.mark.parametrize("name", REPLIES)
def test_kinds(name):
    assert execution(TASK, REPLIES[name]).kind == name.partition(",")[0]


def test_every_kind_has_a_reply():
    assert {name.partition(",")[0] for name in REPLIES} == set(KINDS)


@pytest.mark.parametrize(
    ("name", "right", "executed", "exact", "first_wrong"),
    [
        ("exact", True, 3, 3, None),
        ("exact, with words and signs", True, 3, 3, None),
        ("right", True, 3, 2, 2),
        ("wrong", False, 3, 2, 3),
        ("premature, in the middle", False, 3, 3, None),
        ("under_executed", False, 1, 1, 2),
        ("under_executed, the answer alone", True, 0, 0, 1),
        ("under_executed, the task repeated", True, 0, 0, 1),
        ("self_corrected", True, 3, 2, 3),
        ("self_corrected, the answer", True, 3, 3, None),
    ],
)
def test_measures(name, right, executed, exact, first_wrong):
    found = execution(TASK, REPLIES[name])
    assert (found.is_right, found.executed, found.exact, found.first_wrong) == (right, executed, exact, first_wrong)


@pytest.mark.parametrize(
    ("answer", "right"), [("-3.555", True), ("-3.556", True), ("-3.554", True), ("-3.557", False), ("-3.5550", True)]
)
def test_a_half_may_be_rounded_to_either_side(answer, right):
    assert execution(TASK, f"Answer: {answer}").is_right is right


def test_the_first_answer_counts():
    found = execution(TASK, f"Answer: 1\nAnswer: {TASK.answer}")
    assert (found.answer, found.is_right, found.self_corrected) == (Decimal(1), False, True)
    found = execution(TASK, f"Answer: {TASK.answer}\nAnswer: 1")
    assert found.is_right


def test_thousands_are_read():
    assert execution(TASK, "S3 = 1,234.5\nAnswer: 1,234.5").answer == Decimal("1234.5")


def test_gold_traces_are_exact_and_wrong_ones_wrong():
    for task in diagnostic_tasks(40):
        assert execution(task, task.gold_trace).kind == "exact"
        wrong = execution(task, task.wrong_trace)
        assert wrong.kind == "wrong"
        assert wrong.executed == len(task.steps)
        assert wrong.first_wrong == (len(task.steps) + 1) // 2
