"""The texts of the views, induced instructions, and the teacher's template."""

import pytest

from tests.tasks import rows
from unisd.contexts.template import TEACHER_TEMPLATE, TeacherTemplate
from unisd.tasks import Rejected, make_task, read_rows
from unisd.tasks.views import (
    auxiliary_prefix,
    auxiliary_view,
    induction_view,
    negative_view,
    student_text,
    teacher_view,
)

READINGS = {
    "open": read_rows(rows.OPEN),
    "choice": read_rows([rows.COS_E, {**rows.CHOICE, "question": "Where does a fish swim?", "answer": "under water"}]),
    "code": read_rows(
        [
            rows.MBPP,
            {
                **rows.MBPP,
                "text": "Write a function to halve a number.",
                "code": "def half(x):\n    return x / 2",
                "test_list": ["assert half(2) == 1"],
            },
        ]
    ),
    "tools": read_rows([rows.TOOLS]),
}


@pytest.fixture(params=READINGS)
def reading(request):
    return READINGS[request.param]


def test_teacher_and_negative_differ_in_the_demonstration_alone(reading):
    task, example = reading.task, reading.examples[0]
    teacher = teacher_view(task, example)
    assert teacher.startswith(example.prompt)
    assert teacher.count(example.demonstration) == 1
    assert teacher.endswith(task.study)
    negative = negative_view(task, example, "something else")
    assert negative == teacher.replace(example.demonstration, "something else")


def test_auxiliary_views_share_all_that_precedes_the_prompt(reading):
    task, (first, second, *_) = reading.task, reading.examples
    prefix = auxiliary_prefix(task, [second])
    assert auxiliary_view(task, first, [second]) == prefix + student_text(first)
    assert second.demonstration in prefix
    assert prefix == auxiliary_prefix(task, [second])
    other = read_rows([{"question": "x?", "answer": "y"}]).examples[0]
    assert auxiliary_view(task, other, [second]).startswith(prefix)


def test_auxiliary_views_hold_no_gold_of_the_row_itself(reading):
    task, (first, second, *_) = reading.task, reading.examples
    assert first.demonstration not in auxiliary_view(task, first, [second])
    assert first.demonstration not in induction_view(task, first, "Think. Check. Answer.")


def test_examples_of_tools_come_without_the_documents():
    reading = READINGS["tools"]
    assert "Parameters" in reading.examples[0].prompt
    assert "Parameters" not in auxiliary_prefix(reading.task, reading.examples)


def test_a_view_of_messages_is_of_the_last_one():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q?"}]
    reading = read_rows([{"prompt": turns, "answer": "a"}])
    assert student_text(reading.examples[0]) == "q?"
    assert teacher_view(reading.task, reading.examples[0]).startswith("q?\n\n")


def test_the_template_and_its_study_sentence_can_be_chosen():
    reading = READINGS["open"]
    example = reading.examples[0]
    template = TeacherTemplate("{prompt} {{json}}\n{privileged_context}\n{study}", study="Now you.")
    expected = f"{example.prompt} {{json}}\n{example.demonstration}\nNow you."
    assert teacher_view(reading.task, example, template) == expected
    assert TeacherTemplate().template == TEACHER_TEMPLATE
    assert TeacherTemplate("{prompt}|{demonstration}").fill("{a}", "{b}") == "{a}|{b}"


@pytest.mark.parametrize(
    ("template", "study", "message"),
    [
        ("{prompt}", None, r"lacks the placeholder {demonstration}"),
        ("{demonstration}", None, r"lacks the placeholder {prompt}"),
        ("{prompt} {demonstration} {gold}", None, r"the placeholder {gold}"),
        ("{prompt} {demonstration} {", None, "is no template"),
        ("{prompt} {demonstration}", "Now you.", "study_sentence has no effect"),
    ],
)
def test_templates_that_cannot_be_filled(template, study, message):
    with pytest.raises(ValueError, match=message):
        TeacherTemplate(template, study)


ADVICE = "Read the question twice. Name what is asked for. Check the result against the question."


@pytest.mark.parametrize(
    "reply",
    [ADVICE, f"General instruction: {ADVICE}", ADVICE.replace(". ", ".\n"), "1. " + ADVICE.replace(". ", ".\n2. ")],
)
def test_instructions_that_are_taken(reading, reply):
    assert reading.task.read_instruction(reading.examples[:2], reply) == ADVICE


def test_an_instruction_ends_after_its_fourth_sentence(reading):
    assert reading.task.read_instruction(reading.examples[:2], f"{ADVICE} Be short. And on.") == f"{ADVICE} Be short."


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (" \n", "empty"),
        ("Think well. Then answer the question.", "fewer than 3 sentences"),
        (f"{ADVICE}\n```python\nx = 1\n```", "holds code"),
        (f"{ADVICE} The final answer is B.", "gives an answer"),
        (f"{ADVICE} {'On and on ' * 60}.", "too long"),
        ("Read the question twice. Name what is asked for. Check the", "cut off"),
        ("Read it. What is the capital of the fictional land Norra? Answer it.", "repeats an example"),
        ("Read it twice. Velm is its capital. Answer it then.", "holds an answer"),
    ],
)
def test_instructions_that_are_refused(reply, reason):
    reading = READINGS["open"]
    with pytest.raises(Rejected, match=reason) as caught:
        reading.task.read_instruction(reading.examples, reply)
    assert "Velm" not in str(caught.value)


def test_the_induction_request_shows_every_example(reading):
    request = reading.task.induction_request(reading.examples[:2])
    assert all(reading.task.solved(example) in request for example in reading.examples[:2])


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="one of open, choice, code, tools, got 'maths'"):
        make_task("maths")
