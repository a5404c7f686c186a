"""The scoring views of a micro-batch: which tokens they share, the passes that read them, or the server that does."""

from unisd.views.cache import PrefixCache
from unisd.views.scorer import VIEW_PASSES, ViewScorer, view_scorer
from unisd.views.scores import LocalScorer, Scorer
from unisd.views.served import VIEW_SCORERS, ServerScorer, check_view_scorer, served_scorer

__all__ = [
    "VIEW_PASSES",
    "VIEW_SCORERS",
    "LocalScorer",
    "PrefixCache",
    "Scorer",
    "ServerScorer",
    "ViewScorer",
    "check_view_scorer",
    "served_scorer",
    "view_scorer",
]
