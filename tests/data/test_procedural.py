"""The procedural tasks: correct traces, wrong negatives, repeatable generation, splits that never meet."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisd.data.procedural import (
    MAX_STEPS,
    SPLITS,
    ProceduralTask,
    generate_task,
    parse_answer,
    procedural_dataset,
    procedural_rows,
)

TASKS = st.builds(
    generate_task,
    seed=st.integers(0, 10**6),
    index=st.integers(0, 10**6),
    num_steps=st.integers(1, 12),
    look_back=st.integers(1, 6),
    max_value=st.integers(10, 120),
    split=st.sampled_from(SPLITS),
)


KNOWN_QUESTION = """\
a = 3, b = 6
x1 = b + a
x2 = x1 + b
x3 = x2 - b
Compute x1 to x3 in order, one line per step, then write "Answer: <value of x3>".
"""
KNOWN_TRACE = """\
x1 = 6 + 3 = 9
x2 = 9 + 6 = 15
x3 = 15 - 6 = 9
Answer: 9
"""
KNOWN_WRONG_TRACE = """\
x1 = 6 + 3 = 9
x2 = 9 + 6 = 15
x3 = 15 - 6 = 19
Answer: 19
"""


def execute(question: str) -> list[tuple[str, int]]:
    """Carry the procedure out from its text alone, with Python as the arithmetic: (variable, value) of each step."""
    first, *lines = question.split("\n")
    variables = {name: int(value) for name, value in re.findall(r"(\w) = (\d+)", first)}
    results = []
    for line in lines:
        step = re.fullmatch(r"(x\d+) = (\w+ [-+*] \w+)", line)
        if step:
            variables[step[1]] = eval(step[2], {"__builtins__": {}}, dict(variables))
            results.append((step[1], variables[step[1]]))
    return results


def is_true(line: str) -> bool:
    """Whether the arithmetic of a trace line, e.g. `x1 = 3 + 4 = 7`, is right."""
    _, calculation, result = line.split(" = ")
    return eval(calculation, {"__builtins__": {}}) == int(result)


def text_of(prompt: list[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in prompt)


@given(TASKS)
def test_the_gold_trace_is_the_execution_of_the_question(task: ProceduralTask) -> None:
    expected = execute(task.question)
    *lines, last = task.gold_trace.split("\n")
    shown = [(line.split(" = ")[0], int(line.split(" = ")[2])) for line in lines]
    assert shown == expected
    assert len(expected) == len(task.steps)
    assert last == f"Answer: {expected[-1][1]}"
    assert task.answer == expected[-1][1] == parse_answer(task.gold_trace)


@given(TASKS)
def test_every_line_of_the_gold_trace_is_true_arithmetic(task: ProceduralTask) -> None:
    assert all(is_true(line) for line in task.gold_trace.split("\n")[:-1])


@given(max_value=st.integers(10, 120), index=st.integers(0, 1000))
def test_values_stay_in_range(max_value: int, index: int) -> None:
    task = generate_task(0, index, num_steps=9, max_value=max_value, look_back=3)
    assert all(1 <= value <= max_value for value in task.values.values())


@given(TASKS, st.integers(0, 5))
def test_a_wrong_trace_has_one_false_line_and_another_answer(task: ProceduralTask, seed: int) -> None:
    wrong = task.wrong_trace(seed)
    gold_lines, wrong_lines = task.gold_trace.split("\n"), wrong.split("\n")
    assert len(wrong_lines) == len(gold_lines)
    assert parse_answer(wrong) not in (None, task.answer)
    false_lines = [
        line
        for line in wrong_lines[:-1]
        if eval(line.split(" = ")[1], {"__builtins__": {}}) != int(line.split(" = ")[2])
    ]
    assert len(false_lines) == 1, "one mistake, later steps computed correctly from it"
    # The mistake is carried forward: executing the question from the mistaken value on gives the shown answer.
    mistaken, value = false_lines[0].split(" = ")[0], int(false_lines[0].split(" = ")[2])
    variables = {"a": task.a, "b": task.b}
    for step in task.steps:
        variables[step.target] = value if step.target == mistaken else step.evaluate(variables)
    assert parse_answer(wrong) == variables[task.steps[-1].target]
    assert "-" not in re.sub(" - ", "", wrong), "a negative number would give the mistake away"


@given(look_back=st.integers(1, 5), index=st.integers(0, 2000))
def test_operands_are_at_most_look_back_steps_behind(look_back: int, index: int) -> None:
    task = generate_task(1, index, num_steps=10, look_back=look_back)
    for number, step in enumerate(task.steps, start=1):
        read = [int(name[1:]) for name in (step.left, step.right) if name.startswith("x")]
        assert all(number - look_back <= earlier < number for earlier in read)
        assert number == 1 or read, "each step depends on a recent one, so that the steps form one procedure"


def test_look_back_is_used() -> None:
    distances = set()
    for index in range(50):
        for number, step in enumerate(generate_task(0, index, num_steps=10, look_back=4).steps, start=1):
            distances |= {number - int(name[1:]) for name in (step.left, step.right) if name.startswith("x")}
    assert distances == {1, 2, 3, 4}


def test_the_longest_procedure_works() -> None:
    task = generate_task(0, 0, num_steps=MAX_STEPS, look_back=8)
    assert len(execute(task.question)) == MAX_STEPS
    assert parse_answer(task.wrong_trace(0)) != task.answer


def test_a_known_task_stays_as_it_is() -> None:
    """Fixes the generator across processes, machines and Python versions: figures in the docs depend on it."""
    task = generate_task(0, 0, num_steps=3)
    assert task.question == KNOWN_QUESTION.rstrip()
    assert task.gold_trace == KNOWN_TRACE.rstrip()
    assert task.wrong_trace(0) == KNOWN_WRONG_TRACE.rstrip()


def test_generation_does_not_depend_on_the_process() -> None:
    code = "from unisd.data.procedural import procedural_rows as r; print([x['task_id'] for x in r(5, seed='s')])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "4711"}
    )
    assert out.stdout.strip() == str([row["task_id"] for row in procedural_rows(5, seed="s")])


def test_more_rows_begin_with_the_same_rows() -> None:
    assert procedural_rows(40, seed=3)[:15] == procedural_rows(15, seed=3)


def test_another_seed_gives_other_tasks() -> None:
    first, second = procedural_rows(60, seed=0), procedural_rows(60, seed=1)
    shared = {row["task_id"] for row in first} & {row["task_id"] for row in second}
    assert len(shared) < 5


@pytest.mark.parametrize("num_steps", [1, (2, 3)])
def test_splits_are_disjoint_whatever_the_seed(num_steps: int | tuple[int, ...]) -> None:
    """One-step tasks are few (some thousand), so an overlap would show at once."""
    shown: dict[str, set[str]] = {}
    for split in SPLITS:
        for seed in (0, 1):
            for row in procedural_rows(60, seed=seed, split=split, num_steps=num_steps, num_auxiliary=1):
                shown.setdefault(split, set()).add(text_of(row["prompt"]))
                # A demonstration of another split's task would leak it just the same.
                for auxiliary in row["auxiliary_prompts"]:
                    body = text_of(auxiliary).split("Example:\n")[1].split("\n\n")[0]
                    shown[split].add(body)
    for split in SPLITS:
        others = set().union(*(shown[other] for other in SPLITS if other != split))
        assert not shown[split] & others


def test_rows_do_not_repeat_and_honour_exclude() -> None:
    rows = procedural_rows(400, num_steps=1, num_auxiliary=0)
    ids = {row["task_id"] for row in rows}
    assert len(ids) == 400
    more = procedural_rows(400, num_steps=1, num_auxiliary=0, seed=1, exclude=ids)
    assert not ids & {row["task_id"] for row in more}


def test_asking_for_more_tasks_than_there_are_says_so() -> None:
    with pytest.raises(ValueError, match=r"max_value=10.*fewer rows"):
        procedural_rows(5000, num_steps=1, max_value=10, split="validation", num_auxiliary=0)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), num_auxiliary=st.integers(0, 4))
def test_rows_hold_the_contexts_they_promise(seed: int, num_auxiliary: int) -> None:
    for row in procedural_rows(4, seed=seed, num_auxiliary=num_auxiliary, num_steps=(2, 3)):
        question = text_of(row["prompt"])
        assert execute(question)[-1][1] == row["answer"] == parse_answer(row["completion"])
        assert row["num_steps"] == len(execute(question))
        assert row["completion"] not in question

        teacher, negative = text_of(row["teacher_prompt"]), text_of(row["negative_prompt"])
        assert question in teacher
        assert row["completion"] in teacher
        assert question in negative
        assert row["completion"] not in negative
        # The two differ in the demonstration alone.
        shown_wrong = negative.replace(question, "").replace("Solution:", "").strip()
        assert teacher == negative.replace(shown_wrong, row["completion"])
        assert parse_answer(shown_wrong) not in (None, row["answer"])

        assert len(row["auxiliary_prompts"]) == num_auxiliary
        assert len({text_of(prompt) for prompt in row["auxiliary_prompts"]}) == num_auxiliary
        for prompt in row["auxiliary_prompts"]:
            example, _, rest = text_of(prompt).partition("Now solve this one:\n")
            assert rest == question
            assert question not in example
            other_question, other_reply = example.removeprefix("Example:\n").rstrip().split("\n\n")
            steps = execute(other_question)
            assert len(steps) == row["num_steps"], "same difficulty"
            assert parse_answer(other_reply) == steps[-1][1], "the example's reply is right"


def test_the_number_of_steps_is_taken_in_turn() -> None:
    assert [row["num_steps"] for row in procedural_rows(5, num_steps=(1, 4))] == [1, 4, 1, 4, 1]


def test_the_dataset_has_the_rows() -> None:
    rows = procedural_rows(6, seed=2)
    dataset = procedural_dataset(6, seed=2)
    assert len(dataset) == 6
    assert dataset[4] == rows[4]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x1 = 3 + 4 = 7\nAnswer: 7", 7),
        ("Answer:12", 12),
        ("Answer: -3", -3),
        ("Answer: 1\nwait\nAnswer: 2", 2),
        ("The answer is 5", None),
        ("Answer: x2", None),
        ("", None),
    ],
)
def test_parse_answer(text: str, answer: int | None) -> None:
    assert parse_answer(text) == answer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "1..95"),
        ({"num_steps": 96}, "1..95"),
        ({"num_steps": ()}, "empty"),
        ({"look_back": 0}, "look_back"),
        ({"max_value": 9}, "max_value"),
        ({"split": "dev"}, "'dev'"),
        ({"num_auxiliary": -1}, "negative"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        procedural_rows(2, **settings)  # type: ignore[arg-type]
