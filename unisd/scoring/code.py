"""Code: whether a reply holds the function that was asked for, and whether it satisfies the tests."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from unisd.sandbox import Outcome, Sandbox
from unisd.tasks.base import Example
from unisd.tasks.code import function_name, program
from unisd.tasks.text import code_of


def code_in(example: Example, reply: str) -> str | None:
    """The reply's code (of its first fence, preferring Python's; else all of it) if it parses and defines the function
    that the tests call, else None."""
    code = code_of(reply)
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    # A name may also be bound: f = lambda x: x.
    names |= {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return code if function_name(example) in names else None


def run_codes(
    examples: Sequence[Example], codes: Sequence[str | None], sandbox: Sandbox, *, progress: bool = False
) -> list[Outcome | None]:
    """What became of each code with its example's set-up and tests; None where there is no code."""
    places = [place for place, code in enumerate(codes) if code is not None]
    outcomes: list[Outcome | None] = [None] * len(codes)
    ran = sandbox.run_all(
        [program(examples[place], str(codes[place])) for place in places],
        progress="running the code" if progress else None,
    )
    for place, outcome in zip(places, ran, strict=True):
        outcomes[place] = outcome
    return outcomes
