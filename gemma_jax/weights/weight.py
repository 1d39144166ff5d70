"""The base class of every kind of weight, and the dense kind.

Layers never look inside a weight, nor at how the mesh splits it. A kind of weight is a subclass that says
which arrays it holds, how they become a dense array (`dense`) and how a dense array is packed into them
(`pack`). The other methods work for every kind; a kind may override them with something faster.

Shape legend: B batch, L length, D embed, V stored (padded) vocabulary rows, C contracted axes, O output axes.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from gemma_jax.sharding import logical_axes, partition_spec, platform
from gemma_jax.weights import fsdp, native
from gemma_jax.weights.matmul import matmul, sharded_matmul
from gemma_jax.weights.structure import Structure
from gemma_jax.weights.table import Parameter

ROW_BLOCK = 8192  # rows of an embedding that are initialised or packed at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a multiplication may depend on besides the activations and the weight."""

    key: jax.Array | None = None
    """A random key, such as for dropout; None where nothing is random, as in evaluation and sampling."""
    adapters: jax.Array | None = None
    """[B] int32: index of the adapter of each row of the batch; None if no adapters are selected."""
    layer: jax.Array | None = None
    """int32 []: the layer to use of weights that hold all layers; None where they hold one layer."""
    reference: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether to use the frozen copy of the adapters (`Adapters.reference`) in their place."""
    sampling: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether tokens are generated, so that nothing has a gradient and products may be native."""

    def of_layer(self, layer: jax.Array | None) -> "Context":
        """Returns the context within one layer, with a key of its own."""
        if self.key is None or layer is None:
            return self
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, layer))

    def pick(self, array: jax.Array) -> jax.Array:
        """Returns the part of `layer` of an array of all layers; the array itself if `layer` is None."""
        if self.layer is None:
            return array
        # Without the barrier XLA converts a bfloat16 array of all layers to float32 before the loop.
        array, layer = lax.optimization_barrier((array, self.layer))
        return lax.dynamic_index_in_dim(array, layer, keepdims=False)


NO_CONTEXT = Context()


class Weight(nnx.Module):
    """The weight of one layer, or the weights of all layers stacked.

    A scan slices the stacked weights per layer, or `Context.layer` says which layer to use.

    A kind creates its arrays as `nnx.Param` with the metadata `axes` (logical axes, `layers` first where they
    are stacked), and defines `dense` and `pack`. The arrays of an embedding have the
    vocabulary as their first axis.
    """

    differentiable: ClassVar[bool] = False
    """Whether `dense` is just a cast of the only array, which then has a gradient; other kinds are frozen."""

    def __init__(self, parameter: Parameter, mesh: Mesh) -> None:
        self.parameter, self.mesh = parameter, mesh

    @abc.abstractmethod
    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """Returns the dense array of one layer, in the weight's own float dtype if none is given.

        If the arrays hold only some rows, or one device's shard, it returns that portion.
        """

    @abc.abstractmethod
    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        """Converts the dense array of one layer to this weight's stored arrays, by name."""

    def parts(self) -> tuple[Structure, list[jax.Array]]:
        """Splits the weight of one layer into its static structure and its arrays."""
        graphdef, state = nnx.split(self)
        leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        arrays, treedef = jax.tree.flatten(state)
        all_axes = [logical_axes(leaf) for leaf in leaves]
        # One layer, cut out of the stack by a scan, has no axis `layers` any more.
        axes = tuple(names[len(names) - x.ndim :] for names, x in zip(all_axes, arrays, strict=True))
        return Structure(self.parameter, self.mesh, self.differentiable, graphdef, treedef, axes), arrays

    def multiply(self, x: jax.Array) -> jax.Array:
        """[..., *C] activations -> [..., *O] in their dtype, with arrays that fsdp does not split."""
        return matmul(x, self.dense(x.dtype), self.parameter.inputs)

    def native_matmul(self, x: jax.Array, layer: jax.Array) -> jax.Array | None:
        """[R, C] activations of few rows -> [R, O], both float32, with one layer of the stacked weights.

        None if this kind has no native product (see `native.usable`).
        """
        return None

    def _stacked_matmul(self, x: jax.Array, context: Context) -> jax.Array:
        """`matmul` with the weight of `context.layer`, on one CPU device."""
        about = self.parameter
        if native.usable(x, about.inputs, self.mesh):
            leading = x.shape[: x.ndim - about.inputs]
            rows = x.reshape(math.prod(leading), -1)
            assert context.layer is not None
            out = self.native_matmul(rows, context.layer)
            if out is not None:
                return out.reshape(*leading, *about.shape[about.inputs :])
        structure, arrays = self.parts()
        return structure.weight([context.pick(array) for array in arrays]).multiply(x)

    def matmul(self, x: jax.Array, context: Context) -> jax.Array:
        """[B, L, *C] activations -> [B, L, *O] in their dtype."""
        with jax.named_scope(self.parameter.name):
            if context.layer is not None:
                return self._stacked_matmul(x, context)
            # A batch of one is replicated; the partitioner may then prefer to send activations, not weights.
            if self.mesh.shape[fsdp.AXIS] == 1 or len(x) == 1:
                return self.multiply(x)
            structure, arrays = self.parts()
            if self.differentiable:  # devices exchange weights and sum gradients in this dtype
                arrays = [array.astype(x.dtype) for array in arrays]
            return sharded_matmul(x, arrays, structure)

    def embedding_lookup(
        self, tokens: jax.Array | np.ndarray, dtype: jax.typing.DTypeLike, context: Context
    ) -> jax.Array:
        """Returns the embedding of each token.

        Each device looks up its shard of the columns for the tokens of the whole fsdp group. An all-to-all
        then exchanges columns for rows of the batch. XLA's partitioner does the same within a TPU slice, but
        between slices it gathers the gradient of all activations.

        Args:
          tokens: [B, L] integers below V; a sharded table does not check whether they are.
          dtype: The dtype of the result and of what devices exchange. The table's gradient is summed in the
            table's own dtype.
          context: The context of the model's call.

        Returns:
          [B, L, D].
        """
        structure, arrays = self.parts()
        mesh, table = self.mesh, self.parameter

        def take_rows(parts: Sequence[jax.Array], rows: Any, mode: str | None = None) -> jax.Array:
            if context.sampling and mesh.size == 1 and platform(mesh) == "cpu":
                taken = [_sliced_rows(x, rows) for x in parts]
            else:
                taken = [jnp.take(x, rows, axis=0, mode=mode) for x in parts]
            return structure.weight(taken).dense(dtype)

        with jax.named_scope(table.name):
            token_spec = partition_spec(("batch", "length"), tokens.shape, mesh, "tokens")
            if mesh.size == 1 or token_spec[0] is None:
                return take_rows(arrays, tokens)

            def of_device(parts: list[jax.Array], local: jax.Array) -> jax.Array:
                gathered = lax.all_gather(local, fsdp.AXIS, tiled=True)
                if mesh.shape["tensor"] == 1:
                    columns = take_rows(parts, gathered, "clip")
                else:
                    index = gathered - lax.axis_index("tensor") * len(parts[0])
                    here = (index >= 0) & (index < len(parts[0]))
                    found = jnp.where(here[..., None], take_rows(parts, index, "clip"), 0)
                    columns = lax.psum(found, "tensor")
                # The length is the minor dimension: a shard of D may be 8 wide, and a TPU's tile is 128.
                columns = columns.swapaxes(1, 2)
                moved = lax.all_to_all(columns, fsdp.AXIS, split_axis=0, concat_axis=1, tiled=True)
                return moved.swapaxes(1, 2)

            shape = (*tokens.shape, table.shape[1])
            out = partition_spec(("batch", "length", "residual"), shape, mesh, "activations")
            specs = (structure.specs(arrays), token_spec)
            mapped = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
            return mapped(arrays, jnp.asarray(tokens))

    @property
    def table(self) -> "Weight":
        """The weight that holds the embedding of every token, except those of `replaced_logits`."""
        return self

    def replaced_logits(
        self, x: jax.Array, dtype: jax.typing.DTypeLike, context: Context
    ) -> tuple[tuple[int, ...], jax.Array] | None:
        """Returns the logits of tokens whose embedding is not that of `table`; None if there are none.

        Args:
          x: [B, ..., D] activations.
          dtype: The dtype of the logits.
          context: The context of the model's call.

        Returns:
          The ids of n tokens, and their logits [B, ..., n].
        """
        return None

    def native_unembed(self, x: jax.Array) -> jax.Array | None:
        """[R, D] activations of few rows -> [R, V], both float32; None as for `native_matmul`."""
        return None

    def unembed(self, x: jax.Array, dtype: jax.typing.DTypeLike, context: Context) -> jax.Array:
        """[..., D] activations times the transposed table -> [..., V] in `dtype`."""
        with jax.named_scope(self.parameter.name):
            if context.sampling and native.usable(x, 1, self.mesh):
                out = self.native_unembed(x.reshape(-1, x.shape[-1]))
                if out is not None:
                    return out.reshape(*x.shape[:-1], -1).astype(dtype)
            return self._unembed(x, dtype)

    def _unembed(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """`unembed` by XLA."""
        return matmul(x, self.dense().T, dtype=dtype)


Kind = Callable[[Parameter, Mesh, nnx.Rngs, jnp.dtype], Weight]
"""A factory of weights with initial values, all layers stacked."""


class Dense(Weight):
    """One array of floating-point numbers, saved under the name of the parameter itself."""

    differentiable: ClassVar[bool] = True

    def __init__(self, parameter: Parameter, mesh: Mesh, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        super().__init__(parameter, mesh)
        values = initial_values(parameter, rngs.params(), dtype)
        self.array = nnx.Param(values, axes=parameter.stacked_axes)

    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """See `Weight.dense`."""
        array = self.array[...]
        return array if dtype is None else array.astype(dtype)

    def pack(self, array: jax.Array) -> dict[str, jax.Array]:
        """See `Weight.pack`."""
        return {"array": array.astype(self.array.dtype)}

    def native_matmul(self, x: jax.Array, layer: jax.Array) -> jax.Array | None:
        """See `Weight.native_matmul`."""
        return native.matmul(x, self.array[...], layer)

    def native_unembed(self, x: jax.Array) -> jax.Array | None:
        """See `Weight.native_unembed`."""
        return native.unembed(x, self.array[...])


def _sliced_rows(array: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns rows of an array, one after the other.

    XLA's CPU compiler has no gather of bfloat16, so it would convert the whole array to float32 at each call;
    so it would with a slice but for the barriers.
    """

    def row(index: jax.Array) -> jax.Array:
        held, place = lax.optimization_barrier((array, index))
        return lax.optimization_barrier(lax.dynamic_index_in_dim(held, place, keepdims=False))

    return lax.map(row, rows.reshape(-1)).reshape(*rows.shape, *array.shape[1:])


def row_block(rows: int) -> int:
    """Returns a divisor of an embedding's rows: so many are worked on at once, to limit intermediates."""
    return next(n for n in range(min(ROW_BLOCK, rows), 0, -1) if rows % n == 0)


def initial_values(
    parameter: Parameter, key: jax.Array, dtype: jnp.dtype, pack: Callable[[jax.Array], Any] = lambda x: x
) -> Any:
    """Returns random numbers of variance 1 / fan_in, from a normal truncated at two standard deviations.

    They are made one layer at a time, and those of an embedding some rows at a time, because random bits and
    intermediates take several times the memory of the result.

    Args:
      parameter: Whose values.
      key: A random key.
      dtype: The dtype of the dense values.
      pack: Applied to the dense array of one layer, or of some rows of an embedding, before the next is made.

    Returns:
      What `pack` returns, of all layers: the dense array if left out.
    """
    shape = parameter.shape
    count = parameter.layers
    if not count:
        rows = row_block(shape[0])
        count, shape = shape[0] // rows, (rows, *shape[1:])
    # 0.8796 is the standard deviation of a standard normal cut at +-2.
    scale = jnp.asarray(1 / (0.87962566 * math.sqrt(parameter.fan_in)), dtype)

    def block(number: jax.Array) -> Any:
        key_of_block = jax.random.fold_in(key, number)
        return pack(jax.random.truncated_normal(key_of_block, -2.0, 2.0, shape, dtype) * scale)

    blocks = lax.map(block, jnp.arange(count))
    if parameter.layers:
        return blocks
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), blocks)
