"""A clock for generations that publish none."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_jax.planning.compiler import compile_lowered
from gemma_jax.planning.hlo import executions, parse
from gemma_jax.training.hardware import peak_flops

# A feed-forward's product of 8192 tokens: of the shapes that were tried, the one that the compiler fills the
# matrix units with best.
PRODUCT = (8192, 2048, 16384)


def inferred_clock(device: jax.Device) -> float:
    """Cycles a second at which the compiler's estimate for a large product is the published peak.

    It comes out 2% above the clocks that are known (docs/log.md), so seconds made with it are that much too
    few; for other generations nobody knows. Not a published figure: who shows it must say so.
    """
    here = NamedSharding(Mesh(np.array([device]), ("x",)), P())
    M, K, N = PRODUCT
    a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in ((M, K), (K, N)))
    compiled = compile_lowered(jax.jit(jnp.dot).lower(a, b), {})
    cycles = sum(e.instruction.cycles * e.count for e in executions(parse(compiled.text)))
    peak = peak_flops([device])
    assert peak is not None
    return peak * cycles / (2 * M * K * N)
