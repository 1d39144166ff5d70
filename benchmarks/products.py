"""Times ways to write the matmuls of feed-forward and attention, with gradients, to justify those in use.

Prints one JSON line for each way, with the milliseconds of the gradient. The ways run alternately; quote
ratios.

    python benchmarks/products.py [--rounds 7]
"""

import argparse
import json
import statistics

import jax
import jax.numpy as jnp
from jax import lax
from train_step import in_turn

from gemma_jax.model.attention import attend, attention_mask, causal_attend
from gemma_jax.weights import matmul

B, L, D, F, N, H = 16, 256, 256, 1024, 4, 64
EXACT = lax.Precision.HIGHEST


def product_over_axes(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies [B, L, D] by [D, F] without reshaping x to a matrix first."""
    return lax.dot_general(x, weight, (((2,), (0,)), ((), ())), precision=EXACT)


def attend_over_axes(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes attention by einsums over all axes."""
    scores = jnp.einsum("BLNH,BSKH->BNLS", q, k, precision=EXACT)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30))
    return jnp.einsum("BNLS,BSKH->BLNH", weights, v, precision=EXACT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    keys = jax.random.split(jax.random.key(0), 6)
    x, q = jax.random.normal(keys[0], (B, L, D)), jax.random.normal(keys[1], (B, L, N, H))
    k, v = (jax.random.normal(key, (B, L, 1, H)) for key in keys[2:4])
    up, down = jax.random.normal(keys[4], (D, F)) * 0.05, jax.random.normal(keys[5], (F, D)) * 0.05
    positions, segments = jnp.broadcast_to(jnp.arange(L), (B, L)), jnp.ones((B, L), jnp.int32)
    mask = attention_mask(positions, segments, positions, segments)

    def feed_forward(multiply):
        def loss(x, gate, up, down):
            return jnp.sum(jnp.sin(multiply(jax.nn.gelu(multiply(x, gate)) * multiply(x, up), down)))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3))), (x, up, up, down)

    def attention(attending):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(jnp.sin(attending(*qkv))), (0, 1, 2))), (q, k, v)

    ways = {
        "feed-forward, axes": feed_forward(product_over_axes),
        "feed-forward, matrices": feed_forward(matmul),
        "attention, axes": attention(lambda q, k, v: attend_over_axes(q, k, v, mask)),
        "attention, matrices": attention(lambda q, k, v: attend(q, k, v, mask)),
        "attention, matrices in causal blocks": attention(
            lambda q, k, v: causal_attend(q, k, v, positions, segments)
        ),
    }
    calls = {name: lambda f=f, a=a: jax.block_until_ready(f(*a)) for name, (f, a) in ways.items()}
    for name, seconds in in_turn(calls, rounds).items():
        print(json.dumps({"way": name, "milliseconds": round(1000 * statistics.median(seconds), 1)}))


if __name__ == "__main__":
    main()
