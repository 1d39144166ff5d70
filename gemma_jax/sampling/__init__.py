"""Generation of new tokens from prompts, and scoring of given tokens."""

from gemma_jax.sampling.batch import complete_requests
from gemma_jax.sampling.chat import Chat
from gemma_jax.sampling.generate import Generator
from gemma_jax.sampling.requests import Completion, FinishReason, Generation, Request
from gemma_jax.sampling.score import Scorer
from gemma_jax.sampling.text import TextCompletion

__all__ = [
    "Chat",
    "Completion",
    "FinishReason",
    "Generation",
    "Generator",
    "Request",
    "Scorer",
    "TextCompletion",
    "complete_requests",
]
