"""Gemma in JAX: pretrain, plan, convert and sample.

`from gemma_jax import Gemma` is the way in; nothing heavy is imported before that.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_jax.api import Gemma
    from gemma_jax.sampling import Generation

__version__ = "0.1.0"
__all__ = ["Gemma", "Generation", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Gemma", "Generation"):
        from gemma_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'gemma_jax' has no attribute {name!r}")
