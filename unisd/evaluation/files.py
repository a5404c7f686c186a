"""Files of an evaluation: scores as JSON, and every completion beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisd.evaluation.environment import environment
from unisd.evaluation.folder import EVALUATIONS
from unisd_kernels.files import write_json, write_json_lines


def write_result(file: Path, scores: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Write NAME.json: `before`, `scores.as_dict()`, `after`, versions and machine; and NAME.jsonl where there are
    `scores.completions()`. In `eval/` of a run, the run's model card is told."""
    if hasattr(scores, "completions"):
        write_json_lines(file.with_suffix(".jsonl"), scores.completions())
    write_json(file, {**before, **scores.as_dict(), **after, "environment": environment()})
    if file.parent.name == EVALUATIONS:
        from unisd.run.card_evaluations import update_card  # which needs much that an evaluation does not

        update_card(file.parent.parent)
