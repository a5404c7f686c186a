"""Evaluation of a trained model, on its task and on what it could before: procedural accuracy, perplexity, retention.

`unisd.evaluation.files` writes them down; `unisd.compare` makes pages of them.
"""

from unisd.evaluation.perplexity import CompletionScores, completion_scores
from unisd.evaluation.procedural import ProceduralScores, StepScores, evaluate_procedural
from unisd.evaluation.retention import RetentionScores, evaluate_retention

__all__ = [
    "CompletionScores",
    "ProceduralScores",
    "RetentionScores",
    "StepScores",
    "completion_scores",
    "evaluate_procedural",
    "evaluate_retention",
]
