"""Rematerialisation: which values a block keeps for its backward pass, and which it recomputes."""

from collections.abc import Callable
from typing import Any

import jax

# For each policy, the names of the values that a block keeps (`checkpoint_name` in layers.py and attention.py
# assigns the names). All other values are recomputed from the kept ones. The input of a block is always kept.
KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": ("attended", "middle"),
    "projections": ("query", "key", "value", "attended", "middle"),
    "products": ("query", "key", "value", "attended", "middle", "gate", "up"),
}


def rematerialized(block: Callable[..., Any], policy: str, looped: bool) -> Callable[..., Any]:
    """Returns `block` with a backward pass that recomputes the values that the policy does not keep.

    Args:
      block: A function of jax arrays.
      policy: One of the choices of compute.remat.
      looped: Whether the block's gradient runs in a loop of its own. If it does not, the compiler must be
        kept from merging the recomputation with the first computation, which would keep the values after all.
    """
    if policy == "none":
        return block
    if policy == "offload":
        keep = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(KEPT["projections"]),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        keep = jax.checkpoint_policies.save_only_these_names(*KEPT[policy])
    return jax.checkpoint(block, prevent_cse=not looped, policy=keep)
