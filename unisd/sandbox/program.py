"""A program with its tests, and what came of running it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """Code and what it has to satisfy.

    Attributes:
        code: the program: it is imported as a module is, and its names are what the tests find.
        tests: statements that run one after the other, `assert`s as a rule.
        setup: what the tests need before them. Its imports are there for the code too.
    """

    code: str
    tests: tuple[str, ...] = ()
    setup: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        status: "passed" (everything ran to its end), "failed" (an assertion), "crashed" (another exception, or the
            process ended before), "timed out".
        exception: name of the exception's type; "" where there was none.
    """

    status: str
    exception: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"
