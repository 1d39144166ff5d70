"""The Gemma decoder: Flax NNX modules that call pure functions."""

from gemma_jax.model.cache import KVCache
from gemma_jax.model.spec import ModelSpec
from gemma_jax.model.transformer import Transformer, compute_dtype
