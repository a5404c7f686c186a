"""Which other rows a row is shown: never its own question, never one question twice, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from unisd.prepare.embeddings import nearest_rows
from unisd.prepare.neighbours import drawn_sets, fixed_sets, random_contexts, retrieved_contexts
from unisd.prepare.questions import question_groups, question_key

GROUPS = [0, 1, 2, 0, 3, 4, 1, 5, 6, 0]


def shown(contexts):
    return [[row for one in of_row for row in one] for of_row in contexts]


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is it?", " what  is\nIT "), ("caf\u00e9", "cafe\u0301"), ("Say: yes.", "say: yes"), ("\uff21?", "a")],
)
def test_the_same_question(one, other):
    assert question_key(one) == question_key(other)


@pytest.mark.parametrize(("one", "other"), [("2 + 2?", "2 - 2?"), ("is it a", "is it an"), ("a b", "ab")])
def test_other_questions(one, other):
    assert question_groups([one, other]) == [0, 1]


@pytest.mark.parametrize("per_context", [1, 2])
def test_random_contexts_are_other_questions(per_context):
    contexts = random_contexts(GROUPS, 3, per_context, seed=1)
    assert [[len(one) for one in of_row] for of_row in contexts] == [[per_context] * 3] * len(GROUPS)
    for row, others in enumerate(shown(contexts)):
        questions = [GROUPS[other] for other in others]
        assert GROUPS[row] not in questions
        assert len(set(questions)) == 3 * per_context
    assert (
        contexts == random_contexts(GROUPS, 3, per_context, seed=1) != random_contexts(GROUPS, 3, per_context, seed=2)
    )


def test_random_contexts_of_too_few_rows_repeat():
    contexts = shown(random_contexts([0, 1, 1, 2], 5, 1, seed=0))
    for row, others in enumerate(contexts):
        assert {[0, 1, 1, 2][other] for other in others} == {0, 1, 2} - {[0, 1, 1, 2][row]}
    with pytest.raises(ValueError, match="ask the same question"):
        random_contexts([0, 0, 0], 2, 1, seed=0)


def test_fewer_others_than_asked_for():
    found = nearest_rows(np.eye(3, dtype=np.float32), [0, 0, 1], 4, progress=False)
    assert [[row for row in line if row >= 0] for line in found.tolist()] == [[2], [2], [0]]
    assert retrieved_contexts([[2], [2], [0]], 2, 1) == [[[2], [2]], [[2], [2]], [[0], [0]]]


def test_a_pool_of_sets():
    sets = fixed_sets(GROUPS, 3, 2, seed=4)
    questions = [GROUPS[row] for one in sets for row in one]
    assert len(set(questions)) == 6
    drawn = drawn_sets(GROUPS, sets, 2, seed=4)
    for row, numbers in enumerate(drawn):
        assert len(set(numbers)) == 2
        assert GROUPS[row] not in [GROUPS[other] for number in numbers for other in sets[number]]
    with pytest.raises(ValueError, match="8 different questions, got 7"):
        fixed_sets(GROUPS, 4, 2, seed=4)
