"""Open questions: any question with an answer in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any

from unisd.tasks.base import Example, Rejected, Task
from unisd.tasks.columns import CONVERSATIONS, Columns
from unisd.tasks.text import json_object, longest_common_run, plain, words
from unisd.turns import Prompt

_MISTAKES = (
    "It gets one decisive fact wrong.",
    "It sounds half right but draws the wrong conclusion.",
    "It answers a slightly different question than the one that was asked.",
    "It repeats a common misconception with confidence.",
)


class OpenAnswer(Task):
    """A question and its answer, as texts or messages."""

    name = "open"
    negative_tokens = 512

    def read(self, row: Mapping[str, Any], columns: Columns, rng: Random | None = None) -> Example:
        prompt, answer = _turns(row, columns)
        explanation = text_of(row, columns.explanation)
        question = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        demonstration = f"{explanation}\n\n{answer}" if explanation and explanation != answer else answer
        return Example(question, prompt, answer, demonstration, explanation=explanation)

    def reply_tokens(self, example: Example) -> int:
        # A wrong answer is about as long as the right one; a token is seldom shorter than half a word. A power of two,
        # so that many requests are alike.
        return min(self.negative_tokens, 1 << (24 + 3 * len(words(example.answer))).bit_length())

    def solved(self, example: Example) -> str:
        return f"Question: {example.question}\nAnswer: {example.demonstration}"

    def negative_request(self, example: Example, place: int) -> str:
        return (
            "Write a wrong answer to the question below, for an exercise in which readers have to find the mistake. It "
            f"must be plausible, about as long as the right answer, and wrong. {_MISTAKES[place % len(_MISTAKES)]}\n\n"
            f"Question: {example.question}\n\nRight answer: {example.answer}\n\n"
            'Reply with JSON only: {"answer": "<the wrong answer>"}'
        )

    def read_negative(self, example: Example, place: int, reply: str) -> str:
        found = json_object(reply)
        if found is None and reply.strip().startswith(("{", "[", "```")):
            raise Rejected("the reply is broken JSON")
        value = reply if found is None else found.get("answer")
        if not isinstance(value, (str, int, float)):
            raise Rejected("the reply holds no answer")
        wrong = str(value).strip()
        for label in ("wrong answer:", "answer:"):
            if wrong.casefold().startswith(label):
                wrong = wrong[len(label) :].strip()
        if not wrong or (words(example.answer) and not words(wrong)):
            raise Rejected("the reply holds no answer")
        if plain(wrong) == plain(example.answer):
            raise Rejected("the answer is the right one")
        if "<the wrong answer>" in wrong:
            raise Rejected("the reply repeats the request")
        shared = longest_common_run(example.answer, wrong)
        if shared and shared == len(words(example.answer)) and not _numbers(wrong, example.answer):
            raise Rejected("the answer holds the right one")
        if shared and shared == len(words(wrong)) and not _numbers(wrong, example.answer):
            raise Rejected("the answer is a part of the right one")
        if plain(wrong) == plain(example.question):
            raise Rejected("the answer is the question")
        return wrong


def _numbers(*texts: str) -> bool:
    """Whether all are numbers and nothing else: signs and points count there, which are no words."""
    return all(re.fullmatch(r"[-+]?[\d.,]*\d", text.strip().rstrip(".")) for text in texts)


def text_of(row: Mapping[str, Any], column: str | None) -> str:
    """The text of a column, stripped; "" where there is none."""
    value = None if column is None else row.get(column)
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise Rejected(f"column {column!r} holds {type(value).__name__}, not a text")
    return str(value).strip()


def _turns(row: Mapping[str, Any], columns: Columns) -> tuple[Prompt, str]:
    """The prompt and the answer of a row."""
    if columns.prompt is None:
        name = next(name for name in CONVERSATIONS if name in row)
        turns = _messages(row[name], name)
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise Rejected(f"the conversation in {name!r} does not end with a user's and an assistant's message")
        return _prompt(turns[:-1], name), _nonempty(turns[-1]["content"], "answer")
    value = row.get(columns.prompt)
    prompt = (
        _prompt(_messages(value, columns.prompt), columns.prompt)
        if isinstance(value, list)
        else _nonempty(text_of(row, columns.prompt), "question")
    )
    answer = row.get(str(columns.answer))
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list):
        turns = _messages(answer, str(columns.answer))
        return prompt, _nonempty(turns[-1]["content"], "answer")
    return prompt, _nonempty(text_of(row, columns.answer), "answer")


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise Rejected(f"column {column!r} holds no list of messages")
    turns = [
        {"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))}
        for turn in value
    ]
    names = {"human": "user", "gpt": "assistant"}
    for turn in turns:
        turn["role"] = names.get(str(turn["role"]), turn["role"])
        if not isinstance(turn["content"], str):
            raise Rejected(f"a message in {column!r} is not a text")
    return turns


def _prompt(turns: list[dict[str, Any]], column: str) -> Prompt:
    if turns[-1]["role"] != "user":
        raise Rejected(f"the question in {column!r} does not end with the user's message")
    _nonempty(turns[-1]["content"], "question")
    return turns


def _nonempty(text: str, what: str) -> str:
    if not text.strip():
        raise Rejected(f"the {what} is empty")
    return text.strip()
