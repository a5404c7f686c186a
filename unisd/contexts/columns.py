"""Columns of a dataset, and the views that a row of them gives.

    prompt                the question: a string, or chat messages
    teacher_prompt        the question in its richer context, or instead
    privileged_context    text to put into the teacher's template together with the prompt
    auxiliary_prompts     K other contexts of the same question (only with agreement, or a consensus as the teacher)
    negative_prompt       the question with a plausible wrong demonstration (only with the contrastive term, or a
                          teacher sharpened away from it)

Every view is a prompt that ends where the completion begins, and all views of a row stand in one frame
(`unisd.contexts.frame`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unisd.contexts.frame import PromptFrame, is_conversation
from unisd.contexts.template import TeacherTemplate
from unisd.turns import Prompt

CONTEXT_COLUMNS = (
    "teacher_prompt",
    "privileged_context",
    "auxiliary_prompts",
    "auxiliary_pool",
    "negative_prompt",
    "demonstration",
)
"""Columns kept besides `prompt`."""

DEMONSTRATION = "demonstration"
"""Name, among those of the views, of the gold answer that supervised fine-tuning reads as the completion."""


@dataclass(frozen=True)
class ContextSpec:
    """Views that a run needs.

    Attributes:
        num_auxiliary: K, 0 where none is read.
        negative: whether a negative context is needed.
        preset: name of the preset, for messages.
        template: of the teacher's prompt where a row holds a `privileged_context`.
        supervised: the student's view alone, and the column `demonstration`.
        without_auxiliary, without_negative: settings under which these columns are not needed, for messages.
    """

    num_auxiliary: int
    negative: bool
    preset: str
    template: TeacherTemplate = TeacherTemplate()
    supervised: bool = False
    without_auxiliary: str = "agreement='none'"
    without_negative: str = "contrastive_weight=0"

    @classmethod
    def of_run(cls, args: Any) -> ContextSpec:
        """The views that a `UniSDConfig` needs."""
        return cls(
            args.num_auxiliary if args.reads_auxiliary else 0,
            args.reads_negative,
            args.preset,
            TeacherTemplate.of(args),
            args.is_supervised,
            _switched_off(("agreement='none'", args.uses_agreement), mixed=args.teacher_mixture == "consensus"),
            _switched_off(("contrastive_weight=0", args.uses_contrastive), mixed=args.teacher_mixture == "contrastive"),
        )

    def check_columns(self, columns: Iterable[str], where: str) -> None:
        """Raise ValueError, naming the column, if one that is needed is missing."""
        present = set(columns)
        why = f"is needed by the mechanisms of preset {self.preset!r} (as configured), but {where} has only "
        why += f"{', '.join(map(repr, sorted(present))) or 'no columns'}"
        if "prompt" not in present:
            raise ValueError(f"column 'prompt' {why}")
        if self.supervised:
            if "demonstration" not in present:
                raise ValueError(f"column 'demonstration' {why}")
            return
        if not present & {"teacher_prompt", "privileged_context"}:
            raise ValueError(f"column 'teacher_prompt' (or 'privileged_context') {why}")
        if self.num_auxiliary and "auxiliary_prompts" not in present:
            raise ValueError(f"column 'auxiliary_prompts' {why}; add it, or set {self.without_auxiliary}")
        if self.negative and "negative_prompt" not in present:
            raise ValueError(f"column 'negative_prompt' {why}; add it, or set {self.without_negative}")


def _switched_off(term: tuple[str, bool], *, mixed: bool) -> str:
    """The settings without which a column is not needed: of a term that reads it, and of the teacher's mixture."""
    setting, is_used = term
    return " and ".join([*([setting] if is_used or not mixed else []), *(["teacher_mixture='self'"] if mixed else [])])


@dataclass(frozen=True)
class RowViews:
    """The prompts of a batch of B rows by view."""

    student: list[Prompt]
    teacher: list[Prompt]
    auxiliary: list[list[Prompt]]  # [K][B]
    negative: list[Prompt] | None

    def named(self) -> list[tuple[str, list[Prompt]]]:
        """Pairs (name for messages, prompts) of every view besides the student's, teacher first."""
        views = [("teacher prompt", self.teacher)] if self.teacher else []
        views += [(f"auxiliary prompt {k}", prompts) for k, prompts in enumerate(self.auxiliary)]
        return views if self.negative is None else [*views, ("negative prompt", self.negative)]


def build_teacher_prompt(
    prompt: Prompt, privileged_context: str, template: TeacherTemplate = TeacherTemplate()
) -> Prompt:
    """The template filled in: a string for a string, messages for messages. In a conversation the text takes the place
    of the content of the last message, which must be the user's; earlier messages stay as they are.

    Raises:
        ValueError: a conversation that does not end with a user message of plain text.
        TypeError: a prompt that is neither, or a privileged context that is no string.
    """
    if not isinstance(privileged_context, str):
        raise TypeError(f"privileged_context must be a string, got {type(privileged_context).__name__}")
    if not privileged_context.strip():
        raise ValueError("privileged_context is empty")
    if isinstance(prompt, str):
        return template.fill(prompt, privileged_context)
    if not is_conversation(prompt):
        raise TypeError(f"prompt must be a string or a non-empty list of messages, got {prompt!r}")
    *earlier, last = prompt
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise ValueError(
            "privileged_context can only be put into a conversation that ends with a user message of plain text, got "
            f"role {last.get('role')!r} with content of type {type(last.get('content')).__name__}; give the column "
            "'teacher_prompt' instead"
        )
    return [*earlier, {**last, "content": template.fill(last["content"], privileged_context)}]


def views_of_row(row: Mapping[str, Any], spec: ContextSpec, frame: PromptFrame) -> dict[str, Prompt]:
    """Every view of a row by its name for messages, the student's "prompt" first, all in one frame. A row's
    `teacher_prompt` goes before its `privileged_context`.

    Raises:
        ValueError, TypeError: a value that is missing, empty or of the wrong type, another number of auxiliary prompts
            than configured, a view in another frame. The message names column or view, not the row.
    """
    # A column that is there, but empty in this row, is missing just the same.
    spec.check_columns((name for name, value in row.items() if value is not None), "the row")
    if spec.supervised:
        if not isinstance(row["demonstration"], str) or not row["demonstration"].strip():
            raise ValueError(f"the demonstration must be a text, got {row['demonstration']!r:.60}")
        return frame.apply({"prompt": row["prompt"]})
    given = row.get("teacher_prompt")
    teacher = build_teacher_prompt(row["prompt"], row["privileged_context"], spec.template) if given is None else given
    views = {"prompt": row["prompt"], "teacher prompt": teacher}
    if spec.num_auxiliary:
        prompts = row["auxiliary_prompts"]
        if not isinstance(prompts, (list, tuple)) or len(prompts) != spec.num_auxiliary:
            got = len(prompts) if isinstance(prompts, (list, tuple)) else type(prompts).__name__
            raise ValueError(
                f"the row has {got} 'auxiliary_prompts' but num_auxiliary is {spec.num_auxiliary}; give every row that "
                "many contexts, or set num_auxiliary"
            )
        views |= {f"auxiliary prompt {k}": prompt for k, prompt in enumerate(prompts)}
    if spec.negative:
        views["negative prompt"] = row["negative_prompt"]
    return frame.apply(views)


def collect_views(rows: Sequence[Mapping[str, Any]], spec: ContextSpec, frame: PromptFrame | None = None) -> RowViews:
    """The prompts of every view of a batch, see `views_of_row`.

    Raises:
        ValueError, TypeError: as there, naming the row of the batch.
    """
    framed = []
    for position, row in enumerate(rows):
        try:
            framed.append(views_of_row(row, spec, frame or PromptFrame()))
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"row {position} of the batch: {error}") from None
    student, *rest = ([views[name] for views in framed] for name in view_names(spec))
    if spec.supervised:
        return RowViews(student, [], [], None)
    teacher, *others = rest
    negative = others.pop() if spec.negative else None
    return RowViews(student, teacher, others, negative)


def view_names(spec: ContextSpec) -> list[str]:
    """Names of the views that `views_of_row` gives, in its order."""
    if spec.supervised:
        return ["prompt"]
    names = ["prompt", "teacher prompt", *(f"auxiliary prompt {k}" for k in range(spec.num_auxiliary))]
    return [*names, "negative prompt"] if spec.negative else names
