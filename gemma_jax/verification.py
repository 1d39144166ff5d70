"""What a model computes, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemma_jax.config import ComputeConfig, TransformerConfig
from gemma_jax.model import abstract_transformer
from gemma_jax.model.attention import causal_attend
from gemma_jax.model.ops import embed, rms_norm


def layer_outputs(
    config: TransformerConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    params: nnx.State,
    tokens: np.ndarray,
    position: int = 0,
) -> dict[str, np.ndarray]:
    """The residual stream after the embedding and after each layer, the final norm, and the logits.

    The layers run one after the other, not in the scan of `Transformer`, but they are the same modules.

    Args:
      tokens: [B, L] integers.
      position: of the first token of each row.

    Returns:
      `embeddings`, `layer_0` ..., `final_norm` of [B, L, D], and `logits` [B, L, vocab_size]; all float32.
    """
    graphdef, _ = abstract_transformer(config, compute, mesh)

    def run(params: nnx.State, tokens: jax.Array) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, params)
        positions = position + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = jnp.ones_like(tokens)
        x = embed(model.embedding[...], tokens, model.dtype)
        found = {"embeddings": x}
        block, stacked = nnx.split(model.blocks)
        for layer in range(config.num_layers):
            state = jax.tree.map(lambda array, layer=layer: array[layer], stacked)
            x = nnx.merge(block, state)(
                x, positions, lambda q, k, v: causal_attend(q, k, v, positions, segments)
            )
            found[f"layer_{layer}"] = x
        found["final_norm"] = rms_norm(x, model.final_norm[...], config.norm_epsilon)
        found["logits"] = model.logits(found["final_norm"])[..., : config.vocab_size]
        return found

    outputs = jax.device_get(jax.jit(run)(params, jnp.asarray(tokens, jnp.int32)))
    # Cast out here: within the compiled program XLA would leave out the rounding to bfloat16.
    return {name: np.asarray(value, np.float32) for name, value in outputs.items()}
