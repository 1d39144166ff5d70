"""The Gemma decoder: modules over pure functions."""

from gemma_jax.model.cache import KVCache
from gemma_jax.model.transformer import (
    Transformer,
    abstract_transformer,
    compute_dtype,
    init_params,
    layer_views,
    mask_padding_rows,
)

__all__ = [
    "KVCache",
    "Transformer",
    "abstract_transformer",
    "compute_dtype",
    "init_params",
    "layer_views",
    "mask_padding_rows",
]
