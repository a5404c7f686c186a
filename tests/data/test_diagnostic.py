"""The diagnostic's tasks: what they are by hand, settings that act, and rows for the trainer."""

from decimal import Decimal

import pytest

from unisd.data.diagnostic import (
    OPERATIONS,
    DiagnosticSettings,
    DiagnosticStep,
    DiagnosticTask,
    applied,
    diagnostic_rows,
    diagnostic_tasks,
    shown,
)

TASK = DiagnosticTask(
    (Decimal("1.5"), Decimal("4")),
    (DiagnosticStep(3, 2, "/", 1), DiagnosticStep(4, 3, "-", 2), DiagnosticStep(5, 4, "*", 3)),
)


def test_a_task_by_hand():
    assert [shown(value) for value in TASK.values] == ["1.5", "4", "2.667", "-1.333", "-3.555"]
    assert TASK.gold_trace == (
        "S3 = 4 / 1.5 = 2.667\nS4 = 2.667 - 4 = -1.333\nS5 = -1.333 * 2.667 = -3.555\nAnswer: -3.555"
    )
    assert TASK.question.startswith("S1 = 1.5\nS2 = 4\nS3 = S2 / S1\nS4 = S3 - S2\nS5 = S4 * S3\n")
    assert TASK.question.endswith('"Answer: <value of S5>".')
    assert "-3.555" not in TASK.wrong_trace.splitlines()[-1]
    assert TASK.wrong_trace.splitlines()[0] == "S3 = 4 / 1.5 = 2.667"


@pytest.mark.parametrize(
    ("left", "op", "right", "expected"),
    [
        ("1", "/", "8", "0.125"),
        ("0.5", "*", "0.001", "0.001"),
        ("-0.5", "*", "0.001", "-0.001"),
        ("2", "/", "3", "0.667"),
    ],
)
def test_rounding_is_half_up(left, op, right, expected):
    assert shown(applied(Decimal(left), op, Decimal(right))) == expected


def test_what_cannot_be_computed_is_an_error():
    with pytest.raises(ZeroDivisionError):
        applied(Decimal(1), "/", Decimal(0))
    with pytest.raises(ValueError, match=r"operation must be one of \+ - \* /, got '%'"):
        applied(Decimal(1), "%", Decimal(2))


@pytest.mark.parametrize("look_back", [1, 3, 7])
def test_operands_lie_exactly_that_far_back(look_back):
    for task in diagnostic_tasks(20, DiagnosticSettings(num_steps=(12,), look_back=look_back)):
        for step in task.steps:
            last = step.target - 1
            assert {step.left, step.right} == {last, max(1, last - look_back)}


@pytest.mark.parametrize(
    ("values", "low", "high"), [("unit", "0.01", "1"), ("small", "1", "10"), ("large", "10", "100")]
)
def test_ranges_operations_and_steps(values, low, high):
    settings = DiagnosticSettings(values=values, num_steps=(5, 9), operations=("+", "/"))
    tasks = diagnostic_tasks(30, settings)
    assert [len(task.steps) for task in tasks] == [5, 9] * 15
    assert {step.op for task in tasks for step in task.steps} == {"+", "/"}
    assert all(Decimal(low) <= value <= Decimal(high) for task in tasks for value in task.inputs)
    assert len({task.task_id for task in tasks}) == 30
    assert all(task.split == "test" for task in tasks)


def test_the_longest_tasks_stay_readable():
    tasks = diagnostic_tasks(5, DiagnosticSettings(num_steps=(95,)))
    assert max(abs(value) for task in tasks for value in task.values) <= 1000
    assert {op for task in tasks for op in (step.op for step in task.steps)} == set(OPERATIONS)


@pytest.mark.parametrize("operations", [("+", "-"), ("-",), OPERATIONS])
def test_no_answer_is_an_input(operations):
    """Which a reply would only have to repeat: a third of the tasks of two differences."""
    settings = DiagnosticSettings(num_steps=(1, 2, 3), operations=operations, split="train")
    tasks = diagnostic_tasks(60, settings)
    assert not [task.question for task in tasks if task.answer in task.inputs]


def test_the_same_again_and_by_seed_and_split():
    first = [task.task_id for task in diagnostic_tasks(12)]
    assert [task.task_id for task in diagnostic_tasks(20)][:12] == first
    other = [task.task_id for task in diagnostic_tasks(12, DiagnosticSettings(seed=1))]
    train = [task.task_id for task in diagnostic_tasks(12, DiagnosticSettings(split="train"))]
    assert not set(first) & set(other)
    assert not set(first) & set(train)
    # Pinned: another sequence would be another benchmark.
    assert diagnostic_tasks(1)[0].question.splitlines()[:3] == ["S1 = 4.17", "S2 = 4.07", "S3 = S2 * S1"]


def test_rows_have_every_view():
    rows = diagnostic_rows(6, num_auxiliary=2)
    for row in rows:
        question = row["prompt"][0]["content"]
        assert row["demonstration"] in row["teacher_prompt"][0]["content"]
        assert row["demonstration"].splitlines()[-1] == f"Answer: {row['answer']}"
        assert row["demonstration"] not in row["negative_prompt"][0]["content"]
        assert len(row["auxiliary_prompts"]) == 2
        for messages in row["auxiliary_prompts"]:
            text = messages[0]["content"]
            assert text.endswith(question)
            assert text.count("Answer: <value of") == 2
            assert text.count(f"S{row['num_steps'] + 2} = ") >= 2
    assert len({row["task_id"] for row in rows}) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": (0,)}, r"num_steps must be in 1\.\.95, got \[0\]"),
        ({"num_steps": ()}, "num_steps must be"),
        ({"look_back": 8}, r"look_back must be in 1\.\.7, got 8"),
        ({"values": "huge"}, "values must be one of unit, small, large, got 'huge'"),
        ({"split": "dev"}, "split must be one of train, validation, test, got 'dev'"),
        ({"operations": ("%",)}, r"operations must be some of \+ - \* /, got %"),
        ({"operations": ()}, "got none"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DiagnosticSettings(**settings)


def test_values_that_cannot_be_written_are_an_error():
    with pytest.raises(ValueError, match=r"no further task of 95 steps of \+ on large values"):
        diagnostic_tasks(1, DiagnosticSettings(num_steps=(95,), operations=("+",), values="large"))
