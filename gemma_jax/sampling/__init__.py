"""From prompts to new tokens."""

from gemma_jax.sampling.chat import Chat
from gemma_jax.sampling.generate import Completion, Generator

__all__ = ["Chat", "Completion", "Generator"]
