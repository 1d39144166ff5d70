"""The Gemma decoder: modules over pure functions."""

from gemma_jax.model.cache import KVCache
from gemma_jax.model.spec import ModelSpec
from gemma_jax.model.transformer import Transformer, compute_dtype, layer_views
