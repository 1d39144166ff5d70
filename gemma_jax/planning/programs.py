"""The programs that are planned: those of training and sampling, lowered with shapes instead of values."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh

from gemma_jax.config import PretrainConfig
from gemma_jax.data.packing import Batch
from gemma_jax.sharding import batch_sharding
from gemma_jax.training.state import abstract_train_state
from gemma_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A program before it is compiled, and what its arguments are."""

    lowered: jax.stages.Lowered
    argument_bytes: dict[str, int]  # on one device, by what it is: parameters, optimizer, batch


def bytes_a_device(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on the device that holds most, without padding of layouts."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def abstract_batch(config: PretrainConfig, mesh: Mesh) -> Batch:
    """A batch as `put_batch` puts it on the mesh, without values."""
    shape = (config.data.batch_size, config.data.sequence_length)
    dtypes: Sequence[str] = ("int32", "int32", "float32", "int32", "int32")  # as Batch declares them
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for dtype in dtypes]
    return Batch(*arrays)  # type: ignore[arg-type]  # shapes in the place of values


def pretrain_step(config: PretrainConfig, mesh: Mesh) -> Program:
    """The step of `gemma pretrain`."""
    state, batch = abstract_train_state(config, mesh), abstract_batch(config, mesh)
    lowered = cast(jax.stages.Wrapped, make_train_step(config, mesh)).lower(state, batch)
    return Program(
        lowered,
        {
            "parameters": bytes_a_device(state.params),
            "optimizer": bytes_a_device((state.step, state.opt_state)),
            "batch": bytes_a_device(batch),
        },
    )
