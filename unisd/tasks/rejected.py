"""The refusal of a row or of a reply."""

from __future__ import annotations


class Rejected(ValueError):
    """A row, or a model's reply, that cannot be used.

    The message is a reason that many rows may share ("the answer is not one of the choices"): it is counted, and never
    holds the content of the row or of the reply.
    """
