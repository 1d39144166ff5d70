"""Functions that examine weights: statistics, differences between two checkpoints, outputs layer by layer.

`gemma verify` prints the results.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gemma_jax.config import TransformerConfig
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.model.attention import self_attend
from gemma_jax.model.ops import rms_norm
from gemma_jax.pretrained.layout import Weights, in_order

WINDOW = 256  # tokens of a window of a text for which the logits of two models are compared
BLOCK = 2**24  # values that are processed at once: in float64 they take 128 MB


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one array. `not_finite` counts NaN and infinities; the values below exclude them."""

    parameter: str
    layer: int | None
    dtype: str
    size: int
    not_finite: int
    mean: float
    rms: float
    smallest: float
    largest: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between two arrays with the same name."""

    parameter: str
    layer: int | None
    equal: bool  # bit for bit, after the wider array is rounded to the dtype of the other
    rounded: bool  # equal, but the dtypes differ, so that one array was rounded
    largest: float  # largest absolute difference
    relative: float  # L2 norm of the difference, divided by that of the second array


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields parts of an array along its first axis, of about `BLOCK` values each."""
    rows = max(1, BLOCK // max(1, array[:1].size))
    yield from (array[start : start + rows] for start in range(0, len(array), rows))


def statistics(weights: Weights, config: TransformerConfig) -> Iterator[Statistics]:
    """Yields the statistics of every array; only one is in memory at once.

    Raises:
      UserError: the weights do not match a checksum that came with them.
    """
    for parameter, layer in in_order(config):
        array = weights.get(parameter, layer)
        finite, total, squares, smallest, largest = 0, 0.0, 0.0, math.inf, -math.inf
        for block in _blocks(array):
            wide = np.asarray(block, np.float64)
            good = wide[np.isfinite(wide)]
            finite += good.size
            total, squares = total + float(good.sum()), squares + float(np.square(good).sum())
            if good.size:
                smallest, largest = min(smallest, float(good.min())), max(largest, float(good.max()))
        count = max(finite, 1)
        mean, rms, bad = total / count, math.sqrt(squares / count), array.size - finite
        yield Statistics(parameter, layer, str(array.dtype), array.size, bad, mean, rms, smallest, largest)


def differences(a: Weights, b: Weights, config: TransformerConfig) -> Iterator[Difference]:
    """Yields the difference of every pair of arrays; only one pair is in memory at once.

    Raises:
      UserError: the weights do not match a checksum that came with them.
    """
    for parameter, layer in in_order(config):
        first, second = a.get(parameter, layer), b.get(parameter, layer)
        narrow = min(first.dtype, second.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
        equal, largest, squares, norm = True, 0.0, 0.0, 0.0
        for x, y in zip(_blocks(first), _blocks(second), strict=True):
            # Compared as integers, so that NaN equals itself, and 0 does not equal -0.
            bits = [part.astype(narrow).view(f"u{narrow.itemsize}") for part in (x, y)]
            equal &= np.array_equal(bits[0], bits[1])
            gap = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))
            largest = max(largest, float(gap.max(initial=0)))
            squares += float(np.square(gap).sum())
            norm += float(np.square(np.asarray(y, np.float64)).sum())
        relative = math.sqrt(squares / norm) if norm else math.sqrt(squares)
        yield Difference(parameter, layer, equal, equal and first.dtype != second.dtype, largest, relative)


@dataclasses.dataclass(frozen=True)
class LogitComparison:
    """How far the logits of a model are from those of another on the same text."""

    tokens: int  # predicted
    perplexity: float
    other_perplexity: float
    agreement: float  # share of positions at which both find the same token likeliest
    largest: float  # largest absolute difference of two logits
    rms: float  # root of the mean squared difference


def compare_logits(
    one: tuple[ModelSpec, nnx.State], other: tuple[ModelSpec, nnx.State], ids: Sequence[int]
) -> LogitComparison:
    """Compares the logits of two models on a text, which is cut into windows that begin with its first token.

    Args:
      one, other: The spec and parameters of each model, on meshes of the same shape.
      ids: At least two token ids. A window has at most WINDOW of them.
    """
    config, rows = one[0].config, one[0].mesh.size

    @jax.jit
    def measure(states: Any, tokens: jax.Array, segments: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        targets, live = tokens[:, 1:], segments[:, 1:] == 1
        positions = jnp.broadcast_to(jnp.arange(targets.shape[1]), targets.shape)
        logits = []
        for spec, params in zip((one[0], other[0]), states, strict=True):
            model = spec.merge(params)
            hidden = model(tokens[:, :-1], positions, segments[:, :-1])
            logits.append(model.logits(hidden)[..., : config.vocab_size])
        losses = [optax.softmax_cross_entropy_with_integer_labels(x, targets) for x in logits]
        same = logits[0].argmax(-1) == logits[1].argmax(-1)
        gap = jnp.abs(logits[0] - logits[1])
        sums = [jnp.sum(x, where=live) for x in (*losses, same, jnp.mean(gap**2, -1))]
        return sums, jnp.max(gap.max(-1), where=live, initial=0)

    size = min(WINDOW, config.context_length, len(ids))
    first, rest = ids[0], ids[1:]
    windows = [[first, *rest[start : start + size - 1]] for start in range(0, len(rest), size - 1)]
    totals, largest = np.zeros(4), 0.0
    for start in range(0, len(windows), rows):
        tokens, segments = np.zeros((2, rows, size), np.int32)
        for row, window in enumerate(windows[start : start + rows]):
            tokens[row, : len(window)], segments[row, : len(window)] = window, 1
        sums, most = jax.device_get(measure((one[1], other[1]), tokens, segments))
        totals, largest = totals + sums, max(largest, float(most))
    ours, theirs, same, squares = (totals / len(rest)).tolist()
    return LogitComparison(len(rest), math.exp(ours), math.exp(theirs), same, largest, math.sqrt(squares))


def layer_outputs(
    spec: ModelSpec, params: nnx.State, tokens: np.ndarray, position: int = 0
) -> dict[str, np.ndarray]:
    """Returns the residual stream after the embedding and after each layer, the final norm, and the logits.

    The layers are the modules of `Transformer`, but they run in a Python loop instead of its scan.

    Args:
      spec: The spec of the model.
      params: The model's parameters.
      tokens: [B, L] integers.
      position: The position of the first token of each row.

    Returns:
      `embeddings`, `layer_0` ..., `final_norm` of shape [B, L, D], and `logits` [B, L, vocab_size]; all
      float32.
    """
    config, mesh = spec.config, spec.mesh

    def run(params: nnx.State, tokens: jax.Array) -> dict[str, jax.Array]:
        model = spec.merge(params)
        positions = position + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = jnp.ones_like(tokens)
        x = model.embed(tokens)
        found = {"embeddings": x}
        block, stacked = nnx.split(model.blocks)
        for layer in range(config.num_layers):
            state = jax.tree.map(lambda array, layer=layer: array[layer], stacked)
            attend = partial(self_attend, positions=positions, segments=segments, mesh=mesh)
            x = nnx.merge(block, state)(x, positions, attend)
            found[f"layer_{layer}"] = x
        found["final_norm"] = rms_norm(x, model.final_norm[...], config.norm_epsilon)
        found["logits"] = model.logits(found["final_norm"])[..., : config.vocab_size]
        return found

    outputs = jax.device_get(jax.jit(run)(params, jnp.asarray(tokens, jnp.int32)))
    # The cast is outside the compiled program, because inside it XLA would skip the rounding to bfloat16.
    return {name: np.asarray(value, np.float32) for name, value in outputs.items()}


def transformers_outputs(folder: Path, dtype: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what `layer_outputs` returns, but computed by transformers from a Hugging Face directory.

    Args:
      folder: The directory with the weights.
      dtype: The dtype of weights and activations.
      tokens: [B, L] integers.

    Raises:
      ImportError: transformers or torch is not installed.
      UserError: transformers cannot load the directory.
    """
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = GemmaConfig.from_pretrained(folder, local_files_only=True)
        # Google's first files say "gelu" but mean the tanh approximation. Newer versions of transformers take
        # the name literally.
        config.hidden_act = "gelu_pytorch_tanh"
        model = GemmaForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
        ).eval()
    except Exception as error:  # of any type: transformers cannot load this directory
        raise UserError(f"transformers does not load {folder} ({str(error)[:200]}).") from error
    found: dict[str, Any] = {}
    inner = model.model
    places = {"embeddings": inner.embed_tokens, "final_norm": inner.norm}
    places |= {f"layer_{i}": layer for i, layer in enumerate(inner.layers)}

    def keep(name: str, module: Any, inputs: Any, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    for name, module in places.items():
        module.register_forward_hook(partial(keep, name))
    with torch.no_grad():
        found["logits"] = model(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits
    return {name: value.float().numpy() for name, value in found.items()}
