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


def test_columns_stand_straight_where_characters_are_wide():
    """日本 takes four columns of a terminal; what is too long for a line is cut where the column ends."""
    row = {"prompt": "日本の首都は", "teacher_prompt": "日本の首都は\n\n" + "東京です" * 20 + "\n" + "END"}
    lines = side_by_side(views_to_show(row), 80).splitlines()
    widths = [sum(2 if ord(one) > 0x2E7F else 1 for one in line) for line in lines]
    assert max(widths) <= 80
    assert max(widths) >= 79  # the long line fills it but for half a character
    # The second column begins at one place: 39 columns and two blanks before it.
    begins = {
        sum(2 if ord(one) > 0x2E7F else 1 for one in line[: line.index(mark)])
        for line in lines
        for mark in ("日本の首都は", "| END", "TEACHER")
        if mark in line and not line.startswith(mark)
    }
    assert begins == {2, 41}
    assert "\0" not in "".join(lines)
    assert "".join(lines).count("東") == 20


def test_the_page_escapes_and_needs_nothing_else():
    text = page(views_to_show(ROW), "Row 0 of <mine>")
    assert "<b>" not in text
    assert "A &lt;b&gt;" in text
    assert text.count("Is 1 &lt; 2?") == 5
    assert "Row 0 of &lt;mine&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "<mark>Solved:" in text
