"""Contexts under which a completion is re-scored: teacher, K auxiliary, negative."""

from unisd.contexts.columns import (
    CONTEXT_COLUMNS,
    DEMONSTRATION,
    ContextSpec,
    RowViews,
    build_teacher_prompt,
    collect_views,
    view_names,
    views_of_row,
)
from unisd.contexts.frame import FRAMES, PromptFrame
from unisd.contexts.template import TEACHER_TEMPLATE, TeacherTemplate
from unisd.contexts.tokens import LengthLimit, tokenize_views

__all__ = [
    "CONTEXT_COLUMNS",
    "DEMONSTRATION",
    "FRAMES",
    "TEACHER_TEMPLATE",
    "ContextSpec",
    "LengthLimit",
    "PromptFrame",
    "RowViews",
    "TeacherTemplate",
    "build_teacher_prompt",
    "collect_views",
    "tokenize_views",
    "view_names",
    "views_of_row",
]
