"""Which letter a reply chooses."""

import pytest

from unisd.scoring.choice import lenient_letter, strict_letter


@pytest.mark.parametrize(
    ("reply", "strict", "lenient"),
    [
        ("It melts.\nAnswer: B", "B", "B"),
        ("It melts.\n**Answer: (B)**.", "B", "B"),
        ("answer: C", "C", "C"),
        ("It melts.\n\n(D)\n", "D", "D"),
        ("Answer: B\nThat is because ice melts.", None, "B"),
        ("The answer is C, since A is false.", None, "C"),
        ("So the answer is **(B)** clearly", None, "B"),
        ("A. no\nB. yes\nI take this.", None, "B"),
        ("C) is right", None, "C"),
        ("It must be D here", None, "D"),
        ("A stray article", None, "A"),
        ("Answer: a lantern", None, None),
        ("the answer is a lantern", None, None),
        ("Answer: Because it is so", None, None),
        ("Answer: E", None, None),
        ("E is no choice here, but B is", None, "B"),
        ("Answer: A. Answer: C", None, "C"),
        ("I'D say so", None, None),
        ("", None, None),
        ("Answer:", None, None),
    ],
)
def test_letters(reply, strict, lenient):
    assert strict_letter(reply, 4) == strict
    assert lenient_letter(reply, 4) == lenient


@pytest.mark.parametrize("letter", "ABCDE")
def test_only_as_many_letters_as_choices(letter):
    assert strict_letter(f"Answer: {letter}", 3) == (letter if letter in "ABC" else None)
    assert lenient_letter(f"the answer is {letter}", 3) == (letter if letter in "ABC" else None)
