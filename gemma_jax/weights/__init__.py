"""What a layer multiplies by, and the functions that do it.

Layers never look inside a weight, nor at how the mesh splits it. Quantised weights and low-rank pairs will be
further kinds here, and only these functions will know of them.
"""

from gemma_jax.weights.embedding import look_up
from gemma_jax.weights.product import product, weight_product

__all__ = ["look_up", "product", "weight_product"]
