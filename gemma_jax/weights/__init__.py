"""What a layer multiplies by, and the one function that does it.

Layers never look inside a weight. Quantised weights and low-rank pairs will be further kinds here,
and only `product` will know of them.
"""

from gemma_jax.weights.embedding import look_up
from gemma_jax.weights.product import GATHERED, product, weight_product

__all__ = ["GATHERED", "look_up", "product", "weight_product"]
