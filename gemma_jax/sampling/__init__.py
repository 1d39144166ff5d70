"""From prompts to new tokens."""

from gemma_jax.sampling.generate import Completion, Generator

__all__ = ["Completion", "Generator"]
