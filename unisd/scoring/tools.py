"""Tool use: the calls of a reply against the gold ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from unisd.tasks.base import Example, Rejected
from unisd.tasks.tools import Call, calls_in, compared


@dataclass(frozen=True)
class CallScore:
    """How calls agree with the gold ones.

    Attributes:
        action: whether there are as many, with the same names in the same order.
        arguments: mean over the gold calls of the share of their non-empty arguments that are equal; a call without
            arguments counts 1. 0 where `action` is False.
        full: whether every call is right.
    """

    action: bool
    arguments: float
    full: bool


def calls_of(reply: str) -> list[Call] | None:
    """Calls of a reply in their order; None where there are none, or none that can be read."""
    try:
        return calls_in(reply)[1] or None
    except Rejected:
        return None


def score_calls(example: Example, calls: list[Call] | None) -> CallScore:
    """Score of some calls; those that the gold answer marks as optional may be there or not."""
    gold = compared(example.details["calls"])
    made = _required(example, compared(calls or []))
    if made is None:
        return CallScore(False, 0.0, False)
    shares = []
    for (_, wanted), (_, given) in zip(gold, made, strict=True):
        equal = sum(_equal(value, given.get(key)) for key, value in wanted.items())
        shares.append(equal / len(wanted) if wanted else 1.0)
    arguments = sum(shares) / len(shares) if shares else 1.0
    return CallScore(True, arguments, arguments == 1.0)


def _required(example: Example, made: list[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]] | None:
    """The calls that stand for the gold ones, if the names are those of the gold answer with some of its optional
    calls or none; else None."""
    sequence = example.details["sequence"]
    optional = [place for place, (_, is_required) in enumerate(sequence) if not is_required]
    for count in range(len(optional) + 1):
        for left_out in combinations(optional, count):
            kept = [entry for place, entry in enumerate(sequence) if place not in left_out]
            if [name for name, _ in kept] == [name for name, _ in made]:
                return [call for call, (_, is_required) in zip(made, kept, strict=True) if is_required]
    return None


def _equal(wanted: str, given: str | None) -> bool:
    if given is None:
        return False
    # A value that an earlier call returns has no one name: "${id from search}".
    return wanted == given or ("${" in wanted and "${" in given)
