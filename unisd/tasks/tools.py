"""Tool use: ToolAlpaca's instructions and gold calls, one row for each instruction of an interface."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from unisd.contexts.template import TOOLS_STUDY
from unisd.tasks.base import Example, Rejected, Task
from unisd.tasks.columns import Columns
from unisd.tasks.text import json_values, plain

Call = tuple[str, dict[str, Any]]
"""Name of a function and its arguments."""

_MISTAKES = (
    "It calls another of the functions than the right one.",
    "It calls the right function with wrong arguments.",
    "It misreads what is asked for.",
    "It makes one call too many.",
)
_FORMAT = (
    "Answer in this form, once for each call:\n"
    "Thought: <what you need and why>\n"
    "Action: <name of a function>\n"
    "Action Input: <its arguments as JSON>\n\n"
    "List all calls in their order. For a value that only an earlier call returns, write "
    '"${name of the value from name of the function}".\n\nResponse:'
)
_ASKING = (
    "getDetails",
    'Asks the user for what the instruction leaves out.\nParameters: {"Question": "string. What to ask."}',
)
"""A function that gold calls use beside those of the interface."""


class Tools(Task):
    """An instruction to be met with calls of documented functions."""

    name = "tools"
    negative_tokens = 384
    study = TOOLS_STUDY

    def read(self, row: Mapping[str, Any], columns: Columns, rng: Random | None = None) -> Example:
        instruction = str(row["instruction"]).strip()
        if not instruction:
            raise Rejected("the instruction is empty")
        documents = dict([*row["documents"].items(), _ASKING])
        calls = [_gold_call(call) for call in row["golden_answers"] if not _optional(call)]
        if not calls:
            raise Rejected("there is no gold call")
        if any(name not in documents for name, _ in calls):
            raise Rejected("a gold call is of a function that is not documented")
        documented = "\n\n".join(f"{name}: {text}" for name, text in documents.items())
        trace = _trace(calls)
        return Example(
            question=instruction,
            prompt=f"Instruction: {instruction}\n\nFunctions of the interface:\n{documented}\n\n{_FORMAT}",
            answer=trace,
            demonstration=trace,
            details={
                "calls": calls,
                "functions": tuple(documents),
                "sequence": tuple((_name(call), not _optional(call)) for call in row["golden_answers"]),
            },
        )

    def solved(self, example: Example) -> str:
        return f"Instruction: {example.question}\n{example.demonstration}"

    def negative_request(self, example: Example, place: int) -> str:
        return (
            "Below is an instruction, the functions that exist and the right calls. For an exercise in finding "
            f"mistakes, write wrong calls that look plausible. {_MISTAKES[place % len(_MISTAKES)]}\n\n"
            f"Instruction: {example.question}\nFunctions: {', '.join(example.details['functions'])}\n"
            f"Right calls: {_as_json(example.details['calls'])}\n\n"
            'Reply with JSON only: {"reasoning": "<a thought that leads to these calls>", "answer": '
            '[{"Action": "<function>", "Action_Input": {<arguments>}}]}'
        )

    def read_negative(self, example: Example, place: int, reply: str) -> str:
        thought, calls = calls_in(reply)
        if not calls:
            raise Rejected("the reply holds no calls")
        if any(name not in example.details["functions"] for name, _ in calls):
            raise Rejected("a call is of a function that does not exist")
        if compared(calls) == compared(example.details["calls"]):
            raise Rejected("the calls are the right ones")
        return _trace(calls, thought)


def instructions_of(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each instruction of an interface's row."""
    documents = {
        name: text
        for name, text in (row.get("Function_Description") or {}).items()
        if isinstance(text, str) and name != "components"
    }
    for instruction, golden in zip(row["Instructions"], row["Golden_Answers"], strict=True):
        yield {"instruction": instruction, "golden_answers": golden, "documents": documents}


def _optional(call: Any) -> bool:
    """Whether a gold call is marked as one that may be left out."""
    return isinstance(call, Mapping) and str(call.get("Action", "")).startswith("[Optional]")


def _name(call: Mapping[str, Any]) -> str:
    return str(call["Action"]).removeprefix("[Optional]").strip()


def compared(calls: Sequence[Call]) -> list[tuple[str, dict[str, str]]]:
    """Calls as they are compared: without empty arguments, blanks, case, and the difference of 1 and "1"."""
    return [
        (name, {key: plain(str(value)) for key, value in arguments.items() if value not in ("", None, [], {})})
        for name, arguments in calls
    ]


def _gold_call(call: Any) -> Call:
    try:
        arguments = call["Action_Input"]
        if isinstance(arguments, str):
            # The result of an earlier call, which stands there bare: {"id": ${id from search}}, and once in the
            # published file with half of its quotes: {"date": ${a date}"}.
            bare = re.compile(r'([:\[,]\s*)(\$\{[^}]*\})"?')
            arguments = json.loads(bare.sub(lambda match: match[1] + json.dumps(match[2]), arguments))
        return str(call["Action"]), dict(arguments)
    except (KeyError, TypeError, ValueError):
        raise Rejected("a gold call is no function with JSON arguments") from None


def calls_in(reply: str) -> tuple[str, list[Call]]:
    """Thought and calls of a reply: of JSON, or of the lines of a trace."""
    for value in json_values(reply):
        if isinstance(value, dict) and "Action" not in value:
            thought, listed = str(value.get("reasoning") or ""), value.get("answer")
        else:
            thought, listed = "", value
        listed = [listed] if isinstance(listed, dict) else listed
        if isinstance(listed, list) and listed and all(isinstance(one, dict) and "Action" in one for one in listed):
            return thought, [_written_call(one["Action"], one.get("Action_Input", {})) for one in listed]
    lines = re.findall(r"Action\s*:\s*(\w+)\s*Action[ _]Input\s*:\s*(\{.*?\})\s*(?=\n|$)", reply, re.DOTALL)
    found = re.search(r"Thought\s*:\s*(.+)", reply)
    return (found[1].strip() if found else ""), [_written_call(name, given) for name, given in lines]


def _written_call(name: Any, arguments: Any) -> Call:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise Rejected("the arguments of a call are not JSON") from None
    if not isinstance(arguments, dict):
        raise Rejected("the arguments of a call are not a JSON object")
    return str(name), arguments


def _trace(calls: Sequence[Call], thought: str = "") -> str:
    steps = []
    for place, (name, arguments) in enumerate(calls):
        why = thought.strip() if thought.strip() and place == 0 else f"{'Next ' if place else ''}I need {name}."
        steps.append(f"Thought: {why}\nAction: {name}\nAction Input: {json.dumps(arguments, ensure_ascii=False)}")
    return "\n".join(steps)


def _as_json(calls: Sequence[Call]) -> str:
    return json.dumps([{"Action": name, "Action_Input": arguments} for name, arguments in calls], ensure_ascii=False)
