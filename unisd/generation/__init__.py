"""Generation: replies and rollouts from the model's own distribution, by this process, vLLM or a server."""

from unisd.generation.decoding import end_token_ids, own_distribution
from unisd.generation.interface import Generator, Request, Sampling
from unisd.generation.make import make_generator
from unisd.generation.transformers import TransformersGenerator, greedy_replies

__all__ = [
    "Generator",
    "Request",
    "Sampling",
    "TransformersGenerator",
    "end_token_ids",
    "greedy_replies",
    "make_generator",
    "own_distribution",
]
