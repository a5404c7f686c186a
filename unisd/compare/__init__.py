"""Runs side by side: scores, drift, cost, curves and completions, as one page and as Markdown."""

from unisd.compare.page import page, rendered
from unisd.compare.runs import Run, load_run

__all__ = ["Run", "load_run", "page", "rendered"]
