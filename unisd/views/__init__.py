"""The scoring views of a micro-batch: which tokens they share, and the passes that read them."""

from unisd.views.cache import PrefixCache
from unisd.views.scorer import VIEW_PASSES, ViewScorer, view_scorer

__all__ = ["VIEW_PASSES", "PrefixCache", "ViewScorer", "view_scorer"]
