"""What can be chosen when rows are prepared."""

from __future__ import annotations

from dataclasses import dataclass, field

from unisd.contexts.template import TeacherTemplate
from unisd.prepare.embeddings import DEFAULT_ENCODER
from unisd.tasks import KINDS, Columns
from unisd_kernels.config import check_choice

CONTEXTS = ("random", "retrieval", "induction")
NEGATIVES = ("model", "other", "none")


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of the views.

    Attributes:
        contexts: of the K auxiliary prompts: solved examples of other rows, drawn at "random" or by "retrieval" of the
            nearest questions, or an instruction that the model induced from some ("induction").
        negatives: wrong demonstrations: of the "model" itself, an "other" row's answer, or "none".
        num_auxiliary: K; 0 for no auxiliary prompts.
        demos_per_context: solved examples in each.
        context_pool: M sets of solved examples, of which each row is shown K; 0 gives every row its own.
        num_demos: solved examples from which an instruction is induced.
        columns, kind: of the rows, see `unisd.tasks`.
        shuffle_choices: whether the order of choices is drawn.
        template: of teacher's and negative's views.
        seed: of everything that is drawn.
        retries: further tries where a model's reply is rejected.
        unsafe_code: run code without bubblewrap, see `unisd.sandbox.Sandbox`.
        encoder: of the questions, for retrieval.

    Raises:
        ValueError: an unknown choice, a number out of range, settings that exclude each other.
    """

    contexts: str = "random"
    negatives: str = "model"
    num_auxiliary: int = 3
    demos_per_context: int = 1
    context_pool: int = 0
    num_demos: int = 3
    columns: Columns = field(default_factory=Columns)
    kind: str | None = None
    shuffle_choices: bool = True
    template: TeacherTemplate = field(default_factory=TeacherTemplate)
    seed: int = 42
    retries: int = 2
    unsafe_code: bool = False
    encoder: str = DEFAULT_ENCODER

    def __post_init__(self) -> None:
        check_choice("contexts", self.contexts, CONTEXTS)
        check_choice("negatives", self.negatives, NEGATIVES)
        if self.kind is not None:
            check_choice("task", self.kind, KINDS)
        for name, low in (
            ("num_auxiliary", 0),
            ("demos_per_context", 1),
            ("context_pool", 0),
            ("num_demos", 1),
            ("retries", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        if self.context_pool:
            if self.contexts != "random":
                raise ValueError(
                    f"context_pool={self.context_pool} has fixed random sets and cannot be used with contexts="
                    f"{self.contexts!r}; give --contexts random"
                )
            if self.context_pool <= self.num_auxiliary:
                raise ValueError(
                    f"context_pool={self.context_pool} must be above num_auxiliary={self.num_auxiliary}: a row is "
                    "shown no set that holds its own question"
                )

    @property
    def needs_model(self) -> bool:
        """Whether a model has to write something."""
        return self.negatives == "model" or (self.contexts == "induction" and self.num_auxiliary > 0)
