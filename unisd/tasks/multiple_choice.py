"""Multiple choice: ScienceQA, CoS-E, GPQA, and any rows with a list of choices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from unisd.tasks.base import Example, Rejected, Task
from unisd.tasks.columns import WRONG_ANSWERS, Columns
from unisd.tasks.open_answer import text_of
from unisd.tasks.text import json_object, plain, words

LETTERS = "ABCDEFGHIJ"
_FORMAT = 'Reason in at most three short sentences, then write your choice on the last line as "Answer: <letter>".'


class MultipleChoice(Task):
    """A question with options, of which one is right."""

    name = "choice"
    negative_tokens = 192

    def read(self, row: Mapping[str, Any], columns: Columns, rng: Random | None = None) -> Example:
        if row.get("image") is not None:
            raise Rejected("the question comes with an image")
        question = text_of(row, columns.prompt)
        if not question:
            raise Rejected("the question is empty")
        choices, right = _choices(row, columns)
        order = list(range(len(choices)))
        if rng is not None:
            rng.shuffle(order)
        shown = tuple(choices[place] for place in order)
        letter = LETTERS[order.index(right)]
        context = "\n".join(text for name in ("hint", "lecture") if (text := text_of(row, name)))
        explanation = text_of(row, columns.explanation)
        prompt = "\n\n".join(
            part for part in (question, f"Context: {context}" if context else "", _options(shown), _FORMAT) if part
        )
        return Example(
            question=question,
            prompt=prompt,
            answer=letter,
            demonstration=_demonstration(explanation, letter),
            choices=shown,
            explanation=explanation,
        )

    def solved(self, example: Example) -> str:
        return f"Question: {example.question}\n{_options(example.choices)}\n{example.demonstration}"

    def negative_request(self, example: Example, place: int) -> str:
        letter = self._wrong_letter(example, place)
        return (
            f"{example.question}\n\n{_options(example.choices)}\n\n"
            f"For an exercise in spotting bad arguments, argue confidently in two to four sentences that the answer is "
            f"{letter} ({example.choices[LETTERS.index(letter)]}). Do not mention that it is wrong.\n\n"
            f'Reply with JSON only: {{"reasoning": "<two to four sentences>", "answer": "{letter}"}}'
        )

    def read_negative(self, example: Example, place: int, reply: str) -> str:
        found = json_object(reply)
        if found is not None:
            reasoning, letter = str(found.get("reasoning") or ""), _letter(str(found.get("answer") or ""), example)
        else:
            # A small letter may be a word: "the answer is a lantern".
            answer = re.search(r"(?i:answer)\W+(?:is\W+)?([A-J])\b(?![' ]\w)", reply)
            letter = answer[1] if answer else None
            reasoning = reply[: answer.start()] if answer else reply
            reasoning = re.sub(r"^\W*(reasoning|explanation)\W*", "", reasoning, flags=re.IGNORECASE)
        reasoning = re.sub(r"\s+", " ", reasoning).strip(" \"'{}")
        if letter is None:
            # An argument for the letter that was asked for need not name it, if it names the choice.
            asked = self._wrong_letter(example, place)
            if not _names(reasoning, example.choices[LETTERS.index(asked)]):
                raise Rejected("the reply names no choice")
            letter = asked
        if letter == example.answer:
            raise Rejected("the answer is the right one")
        if letter not in LETTERS[: len(example.choices)]:
            raise Rejected("the answer is not one of the choices")
        if len(words(reasoning)) < 4 or "two to four sentences" in reasoning:
            raise Rejected("the reply holds no reasoning")
        if re.search(rf"(?i:answer|choice|option)\W+(?:is\W+)?{example.answer}\b(?![' ]\w)", reasoning):
            raise Rejected("the reasoning argues for the right answer")
        return _demonstration(reasoning, letter)

    def content(self, example: Example) -> str:
        return f"{example.question} {' '.join(example.choices)}"

    def _wrong_letter(self, example: Example, place: int) -> str:
        wrong = [letter for letter in LETTERS[: len(example.choices)] if letter != example.answer]
        return wrong[place % len(wrong)]


def _names(text: str, choice: str) -> bool:
    return f" {' '.join(words(choice))} " in f" {' '.join(words(text))} "


def _options(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _demonstration(reasoning: str, letter: str) -> str:
    return f"Reasoning: {reasoning}\nAnswer: {letter}" if reasoning else f"Answer: {letter}"


def _choices(row: Mapping[str, Any], columns: Columns) -> tuple[list[str], int]:
    """The choices in the row's order, and the place of the right one."""
    answer = None if columns.answer is None else row.get(columns.answer)
    if columns.choices is None:
        wrong = [text_of(row, name) for name in WRONG_ANSWERS]
        return _distinct([text_of(row, columns.answer), *wrong]), 0
    given = row.get(columns.choices)
    if isinstance(given, Mapping):  # {"text": [...], "label": [...]}
        labels, given = list(given.get("label", ())), given.get("text")
        if isinstance(answer, str) and answer in labels:
            answer = labels.index(answer)
    if not isinstance(given, (list, tuple)) or not 2 <= len(given) <= len(LETTERS):
        raise Rejected(f"column {columns.choices!r} holds no list of 2 to {len(LETTERS)} choices")
    choices = _distinct([str(choice).strip() for choice in given])
    if isinstance(answer, str):
        texts = [plain(choice) for choice in choices]
        if plain(answer) in texts:
            return choices, texts.index(plain(answer))
        letter = answer.strip().strip("().").upper()
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return choices, LETTERS.index(letter)
        answer = int(answer) if answer.strip().isdigit() else None
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise Rejected("the answer is not one of the choices")
    return choices, answer


def _distinct(choices: list[str]) -> list[str]:
    if not all(choices):
        raise Rejected("a choice is empty")
    if len(set(choices)) < len(choices):
        raise Rejected("two choices are the same")
    return choices


def _letter(answer: str, example: Example) -> str | None:
    """The letter that an answer means: by itself, or by the text of a choice."""
    named = re.match(r"\W*([A-J])\b(?![' ]\w)", answer.strip(), re.IGNORECASE) or re.match(r"\W*([A-J])[.)]", answer)
    if named:
        return named[1].upper()
    texts = [plain(choice) for choice in example.choices]
    return LETTERS[texts.index(plain(answer))] if plain(answer) in texts else None
