"""Lowers the programs to plan, those of training and sampling, with shapes instead of values."""

import dataclasses
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_jax.config import FinetuneConfig, TrainingConfig
from gemma_jax.data.packing import Batch
from gemma_jax.memory import shard_bytes
from gemma_jax.model import KVCache, ModelSpec
from gemma_jax.planning.traffic import Parameter, parameters
from gemma_jax.sampling.decode import Said
from gemma_jax.sampling.generate import Generator
from gemma_jax.sampling.requests import Widths, slot_settings
from gemma_jax.sharding import batch_sharding, named_arrays
from gemma_jax.training.finetuning import finetuning
from gemma_jax.training.hardware import training_flops_a_token
from gemma_jax.training.objectives import Recipe, pretraining
from gemma_jax.training.state import abstract_train_state
from gemma_jax.training.step import make_train_step
from gemma_jax.weights import Kind, kind_of

SEGMENTS = 16  # of a row of preferences, in a plan

Mode = Literal["pretrain", "finetune", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program before it is compiled, with what is known about it."""

    lowered: jax.stages.Lowered
    argument_bytes: dict[str, int]  # bytes on one device, by purpose
    parameters: list[Parameter]
    tokens: int  # tokens that one run of the program processes or generates
    model_flops: float | None  # of the model, per run and for all devices; None if unknown
    cache_bytes: int | None = None  # on one device, of keys and values; None if it is not decoding


def lower(mode: Mode, config: TrainingConfig, mesh: Mesh, new_tokens: int, quantization: str = "") -> Program:
    """Lower the program of a mode for a mesh whose devices need not exist.

    Args:
      mode: `pretrain` and `finetune` are the training step, with all tokens in the loss; `prefill` writes
        data.batch_size prompts of data.sequence_length tokens to the cache; `decode` generates one more token
        for each of them.
      config: The config of the run: its model, batch and compute settings apply.
      mesh: The mesh that the program runs on.
      new_tokens: The number of tokens that the cache has room for after the prompts.
      quantization: The kind of the weights, as `Quantization.parse` reads it; only for prefill and decode.

    Raises:
      UserError: The mesh does not divide a parameter.
    """
    if mode == "pretrain":
        return _training(pretraining(config, mesh))
    if mode == "finetune":
        assert isinstance(config, FinetuneConfig)
        length = config.data.sequence_length
        return _training(finetuning(config, mesh, kind_of(config.quantization), length, SEGMENTS))
    return _sampling(mode, config, mesh, new_tokens, kind_of(quantization))


def _bytes_a_device(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on the device that holds most, without the padding of layouts."""
    return sum(map(shard_bytes, jax.tree.leaves(tree)))


def _training(recipe: Recipe) -> Program:
    config, mesh, state = recipe.config, recipe.model.mesh, abstract_train_state(recipe)
    shape = (config.data.batch_size, config.data.sequence_length)
    dtypes = ("int32", "int32", "float32", "int32", "int32")  # the dtypes of Batch's arrays, in order
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for dtype in dtypes]
    batch = Batch(*arrays)  # type: ignore[arg-type]  # shapes instead of values
    step = cast(jax.stages.Wrapped, make_train_step(recipe))
    parts = {"parameters": state.params, "optimizer": (state.step, state.opt_state), "batch": batch}
    held = {name: _bytes_a_device(part) for name, part in parts.items()}
    frozen = bool(jax.tree.leaves(state.frozen))
    flops = training_flops_a_token(config.model, config.data.sequence_length, frozen=frozen)
    known = parameters(state.params, mesh, named_arrays(state.frozen).keys())
    return Program(step.lower(state, batch), held, known, math.prod(shape), math.prod(shape) * flops)


def _sampling(mode: Mode, config: TrainingConfig, mesh: Mesh, new_tokens: int, kind: Kind) -> Program:
    spec = ModelSpec(config.model, config.compute, mesh, kind)
    params = spec.params
    generator = Generator(spec, params)
    rows, length = config.data.batch_size, config.data.sequence_length
    by_row = batch_sharding(mesh)

    def placed(x: Any, where: Any = by_row) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    tokens, lengths = (placed(jax.ShapeDtypeStruct(s, jnp.int32)) for s in ((rows, length), (rows,)))
    settings = jax.tree.map(placed, slot_settings([], rows, Widths(), config.model.context_length))
    batch, prompts = (tokens, lengths), (tokens, 0, lengths, settings.adapters)
    size = min(length + new_tokens, config.model.context_length)
    held = {"parameters": _bytes_a_device(params)}
    known = parameters(params, mesh)
    if mode == "prefill":
        lowered = generator.prefill.lower(params, *prompts, size=size)
        return Program(lowered, held | {"batch": _bytes_a_device(batch)}, known, rows * length, None)
    cached = generator.prefill.eval_shape(params, *prompts, size=size)
    state, _ = generator.begin.eval_shape(params, cached, settings, Said())
    # The shardings that prefill produces: the cache is split by rows and heads, everything else by rows.
    state = jax.tree.map(placed, state)
    keys, values = KVCache.abstract(config.model, rows, size, generator.cache_dtype, mesh)
    state = state._replace(cache=dataclasses.replace(state.cache, keys=keys, values=values))
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = generator.decode.lower(params, state, steps)
    cache_bytes = _bytes_a_device((keys, values))
    return Program(lowered, held | {"cache": _bytes_a_device(state)}, known, rows, None, cache_bytes)
