"""Generation: replies and rollouts from the model's own distribution."""

from unisd.generation.decoding import end_token_ids, own_distribution
from unisd.generation.transformers import greedy_replies

__all__ = ["end_token_ids", "greedy_replies", "own_distribution"]
