"""From prompts to new tokens."""

from gemma_jax.sampling.generate import Completion, Generator, SamplingSettings

__all__ = ["Completion", "Generator", "SamplingSettings"]
