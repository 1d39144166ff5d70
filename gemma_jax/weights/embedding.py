"""Rows of an embedding table that lies in parts on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from gemma_jax.sharding import partition_spec
from gemma_jax.weights import fsdp


def look_up(
    table: jax.Array, tokens: jax.Array | np.ndarray, dtype: jax.typing.DTypeLike, mesh: Mesh
) -> jax.Array:
    """The row of each token.

    Each device looks up its own columns for the rows of the whole fsdp group, then they change places. The
    partitioner does the same within a slice, but between slices it gathers the gradient of all activations.

    Args:
      table: [V, D], lying as its logical axes say.
      tokens: [B, L] integers below V; a table in parts does not look whether they are.
      dtype: of the result, and of the activations that are sent; the table's gradient is summed in its own.
      mesh: that both lie on.

    Returns:
      [B, L, D].
    """
    rows = partition_spec(("batch", "length"), tokens.shape, mesh, "tokens")
    if mesh.size == 1 or rows[0] is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)

    def of_device(part: jax.Array, own: jax.Array) -> jax.Array:
        all_rows = lax.all_gather(own, fsdp.AXIS, tiled=True)
        if mesh.shape["tensor"] == 1:
            columns = jnp.take(part, all_rows, axis=0, mode="clip").astype(dtype)
        else:
            index = all_rows - lax.axis_index("tensor") * len(part)
            here = (index >= 0) & (index < len(part))
            found = jnp.take(part, index, axis=0, mode="clip")
            columns = lax.psum(jnp.where(here[..., None], found, 0).astype(dtype), "tensor")
        # With the length last: a part of D may be 8 wide, where a row of a TPU's tile is 128.
        columns = columns.swapaxes(1, 2)
        return lax.all_to_all(columns, fsdp.AXIS, split_axis=0, concat_axis=1, tiled=True).swapaxes(1, 2)

    lies = partition_spec(("vocab", "embed"), table.shape, mesh, "embedding")
    out = partition_spec(
        ("batch", "length", "residual"), (*tokens.shape, table.shape[1]), mesh, "activations"
    )
    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=(lies, rows), out_specs=out, check_vma=False)
    return mapped(table, jnp.asarray(tokens))
