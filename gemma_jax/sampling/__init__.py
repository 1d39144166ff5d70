"""Generation of new tokens from prompts, and scoring of given tokens."""

from gemma_jax.sampling.chat import Chat
from gemma_jax.sampling.generate import Completion, FinishReason, Generator, Request
from gemma_jax.sampling.score import Scorer
from gemma_jax.sampling.text import TextCompletion

__all__ = ["Chat", "Completion", "FinishReason", "Generator", "Request", "Scorer", "TextCompletion"]
