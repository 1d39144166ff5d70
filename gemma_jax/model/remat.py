"""What a block keeps for its backward pass, and what it computes again (rematerialisation)."""

from collections.abc import Callable
from typing import Any

import jax

# Values of a block that have a name (`checkpoint_name` in layers.py and attention.py), by policy. What is not
# kept is computed again from what is. The input of a block is always kept.
KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": ("attended", "middle"),
    "projections": ("query", "key", "value", "attended", "middle"),
    "products": ("query", "key", "value", "attended", "middle", "gate", "up"),
}


def rematerialized(block: Callable[..., Any], policy: str, looped: bool) -> Callable[..., Any]:
    """`block`, whose backward pass computes again what the policy does not keep.

    Args:
      block: a function of jax arrays.
      policy: a choice of compute.remat.
      looped: the block's gradient is in a loop of its own; otherwise the compiler would merge what is
        computed again with the first time, and keep it after all.
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
