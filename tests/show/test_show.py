"""The views of a row for people."""

from __future__ import annotations

from unisd.show.page import page
from unisd.show.terminal import side_by_side
from unisd.show.views import views_to_show

ROW = {
    "prompt": "Is 1 < 2?",
    "teacher_prompt": "Is 1 < 2?\n\nHere is an example:\n\nYes & no.",
    "auxiliary_prompts": ["Solved:\nA <b>\n\nIs 1 < 2?", "Solved: C\n\nIs 1 < 2?"],
    "negative_prompt": "Is 1 < 2?\n\nHere is an example:\n\nNever.",
}


def test_the_views_are_told_apart_from_the_students_prompt():
    views = views_to_show(ROW, len)
    assert [view.name for view in views] == ["student", "teacher", "auxiliary 1", "auxiliary 2", "negative"]
    assert views[0].parts == (("Is 1 < 2?", False),)
    assert views[2].parts == (("Solved:\nA <b>\n\n", True), ("Is 1 < 2?", False))
    assert [view.tokens for view in views] == [len(view.text) for view in views]


def test_the_terminal_holds_its_width_and_every_word():
    views = views_to_show(ROW)
    for width in (38, 60, 100, 200):
        text = side_by_side(views, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.count("Is 1 < 2?") == 5
    wide, narrow = side_by_side(views, 200).splitlines(), side_by_side(views, 40).splitlines()
    assert len(wide) < len(narrow)
    assert "| Solved:" in side_by_side(views, 40)


def test_the_page_escapes_and_needs_nothing_else():
    text = page(views_to_show(ROW), "Row 0 of <mine>")
    assert "<b>" not in text
    assert "A &lt;b&gt;" in text
    assert text.count("Is 1 &lt; 2?") == 5
    assert "Row 0 of &lt;mine&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "<mark>Solved:" in text
