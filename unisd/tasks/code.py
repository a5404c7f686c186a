"""Code: MBPP (full and sanitized), HumanEval, and any rows with a task, a solution and tests."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from unisd.sandbox import Program, Sandbox
from unisd.tasks.base import Example, Rejected, Task
from unisd.tasks.columns import Columns
from unisd.tasks.open_answer import text_of
from unisd.tasks.text import code_of, json_object

_MISTAKES = (
    "It is off by one: an index, a bound or a count.",
    "It uses a wrong operator or comparison.",
    "It misses an edge case.",
    "It returns the wrong value, or of the wrong type.",
)
_NOTES = "Write only the code: no explanation, no example calls, no tests."


class Code(Task):
    """A function to write, and statements that it must satisfy.

    Args:
        unsafe_code: run code without bubblewrap to see whether it satisfies them, see `unisd.sandbox.Sandbox`.
    """

    name = "code"

    def __init__(self, unsafe_code: bool = False) -> None:
        self._unsafe_code = unsafe_code
        self._made: Sandbox | None = None

    @property
    def _sandbox(self) -> Sandbox:
        if self._made is None:  # when code is to run, not before: who makes no negatives needs none
            self._made = Sandbox(self._unsafe_code)
        return self._made

    def read(self, row: Mapping[str, Any], columns: Columns, rng: Random | None = None) -> Example:
        if row.get("entry_point") and row.get("test") and row.get("prompt"):
            return _humaneval(row)
        task, code = text_of(row, columns.prompt), text_of(row, columns.answer)
        if not task or not code:
            raise Rejected("the task or its code is empty")
        code = textwrap.dedent(code.replace("\r\n", "\n")).expandtabs(4)
        tests = _tests(row.get(str(columns.tests)))
        imports = "\n".join(row.get("test_imports") or ())
        setup = "\n".join(part for part in (imports, text_of(row, "test_setup_code")) if part)
        function, code = _tested_function(code, tests)
        prompt = (
            f"{task}\n\nThe function: `{function}`\n{_NOTES}\n"
            "Put it into one fenced block:\n```python\n<your code>\n```\n\nIt must satisfy:\n" + "\n".join(tests)
        )
        return Example(
            question=task,
            prompt=prompt,
            answer=code,
            demonstration=code,
            tests=tests,
            details={"setup": setup, "function": function},
        )

    def search_text(self, example: Example) -> str:
        return str(example.prompt)

    def faults(self, examples: Sequence[Example], *, progress: bool = False) -> list[Rejected | None]:
        """A row whose own code does not satisfy its tests: every other code would fail them too."""
        outcomes = self._sandbox.run_all(
            [program(example, example.answer) for example in examples],
            progress="running the reference code" if progress else None,
        )
        return [
            None if outcome.passed else Rejected(f"the reference code does not pass its tests ({outcome.status})")
            for outcome in outcomes
        ]

    def reply_tokens(self, example: Example) -> int:
        # Wrong code is about as long as the right one, with a few words around it. A power of two, so that many
        # requests are alike.
        return min(self.negative_tokens, 1 << (96 + len(example.answer) // 2).bit_length())

    def solved(self, example: Example) -> str:
        tests = "\n".join(example.tests)
        return f"Task: {example.question}\nTests:\n{tests}\nSolution:\n```python\n{example.demonstration}\n```"

    def negative_request(self, example: Example, place: int) -> str:
        tests = "\n".join(example.tests)
        return (
            "Write a wrong solution to the task below, for an exercise in which readers have to find the bug. It must "
            f"look right, run, and fail at least one of the tests. {_MISTAKES[place % len(_MISTAKES)]}\n\n"
            f"Task: {example.question}\nThe function: `{example.details['function']}`\nTests:\n{tests}\n\n"
            'Reply with JSON only: {"reasoning": "<what is wrong>", "answer": "<the wrong code>"}, or with the code in '
            "one fenced block."
        )

    def read_negative(self, example: Example, place: int, reply: str) -> str:
        (held,) = self.read_negatives([(example, place, reply)])
        if isinstance(held, Rejected):
            raise held
        return held

    def read_negatives(
        self, asked: Sequence[tuple[Example, int, str]], *, progress: bool = False
    ) -> list[str | Rejected]:
        held = [_wrong_code(example, reply) for example, _, reply in asked]
        places = [place for place, one in enumerate(held) if isinstance(one, str)]
        outcomes = self._sandbox.run_all(
            [program(asked[place][0], str(held[place])) for place in places],
            progress="running the wrong code" if progress else None,
        )
        for place, outcome in zip(places, outcomes, strict=True):
            if outcome.passed:
                held[place] = Rejected("the code passes every test")
            elif outcome.status == "timed out":
                # Not a wrong answer that anybody sees, and on a busy machine another time none at all.
                held[place] = Rejected("the code does not end")
        return held


def program(example: Example, code: str) -> Program:
    """The code with the example's set-up and tests."""
    return Program(code, example.tests, str(example.details["setup"]))


def _wrong_code(example: Example, reply: str) -> str | Rejected:
    found = json_object(reply)
    answer = found.get("answer") if found else None
    code = code_of(answer if isinstance(answer, str) and answer.strip() else reply).strip()
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return Rejected("the reply holds no code that parses")
    name = function_name(example)
    if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
        return Rejected("the code does not define the function")
    if ast.dump(tree) == ast.dump(ast.parse(example.answer)):
        return Rejected("the code is the reference")
    return code


def _tests(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        given = [given]
    tests = tuple(str(test).strip() for test in given or () if str(test).strip())
    if not tests:
        raise Rejected("there are no tests")
    return tests


def _tested_function(code: str, tests: Sequence[str]) -> tuple[str, str]:
    """Signature of the function that the tests call, and the code, in which it has that name."""
    try:
        tree = ast.parse(code)
        called = [
            node.func.id
            for test in tests
            for node in ast.walk(ast.parse(test))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
    except (SyntaxError, ValueError):
        raise Rejected("the reference code or a test does not parse") from None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if not functions:
        raise Rejected("the reference code defines no function")
    known = [name for name in called if name in functions]
    if known:
        name = known[0]
    else:
        wanted = [name for name in called if not hasattr(builtins, name)]
        if not wanted:
            raise Rejected("the tests call no function of the code")
        old, name = list(functions)[-1], wanted[0]
        code = re.sub(rf"\b{re.escape(old)}\b", name, code)
        functions[name] = functions[old]
    return f"{name}({ast.unparse(functions[name].args)})", code


def function_name(example: Example) -> str:
    """Name of the function that the tests call."""
    return str(example.details["function"]).partition("(")[0]


def _humaneval(row: Mapping[str, Any]) -> Example:
    prompt, entry = str(row["prompt"]), str(row["entry_point"])
    code = prompt + str(row.get("canonical_solution") or "")
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        raise Rejected("the reference code or a test does not parse") from None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if entry not in functions:
        raise Rejected("the reference code does not define the function")
    imports = "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    return Example(
        question=prompt,
        prompt=(
            f"Complete this function. {_NOTES} Repeat the imports that it needs.\n"
            f"Put it into one fenced block:\n```python\n<your code>\n```\n\n{prompt}"
        ),
        answer=code,
        demonstration=code,
        tests=(f"{row['test']}\ncheck({entry})",),
        details={"setup": imports, "function": f"{entry}({ast.unparse(functions[entry].args)})"},
    )
