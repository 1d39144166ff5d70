"""Blocked cross entropy against the plain one, in value, gradient and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model.scoring import scores_of
from gemma_jax.testing import assert_same, assert_same_on_meshes, cpu_mesh, relative_difference
from gemma_jax.training.loss import LossSettings, next_token_loss
from tests.weights.kinds import dense_weight

B, L, D, V, ROWS = 4, 22, 16, 120, 128
TABLE = ("vocab", "embed")


def inputs(dtype=np.float64):
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(B, L, D)), rng.normal(size=(ROWS, D))
    weights = rng.integers(0, 2, (B, L)) * rng.uniform(0.5, 2, (B, L))
    return hidden.astype(dtype), table.astype(dtype), rng.integers(0, V, (B, L)), weights.astype(dtype)


def loss_on(mesh, hidden, table, targets, weights, settings):
    return next_token_loss(hidden, dense_weight(table, TABLE, mesh), targets, weights, settings)


def plain_loss(hidden, table, targets, weights, z_loss: float):
    """With all logits at once, from jax's own functions."""
    logits = hidden @ table[:V].T
    log_probs = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    penalty = z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum(weights * (cross_entropy + penalty)), jnp.sum(weights * cross_entropy)


# Blocks of positions that divide the length, that leave a rest, and that are longer than the row; blocks of
# the vocabulary of which the last holds padding rows alone, that do not divide it, and that are longer.
BLOCKS = [(1, 0, 0.1), (8, 0, 0.0), (11, 0, 0.1), (64, 0, 0.0), (11, 8, 0.1), (11, 100, 0.0), (11, 1000, 0.1)]


@pytest.mark.parametrize(("block", "vocab_block", "z_loss"), BLOCKS)
def test_blocked_equals_plain_in_value_and_gradient(block: int, vocab_block: int, z_loss: float) -> None:
    with jax.enable_x64(True):
        hidden, table, targets, weights = inputs()
        settings = LossSettings(V, block, vocab_block, z_loss)
        # A factor in front, because the backward pass must scale what the forward pass formed.
        loss = jax.jit(lambda h, e: loss_on(cpu_mesh(1), h, e, targets, weights, settings))
        blocked = lambda h, e: 3.5 * loss(h, e)[0]  # noqa: E731
        plain = lambda h, e: 3.5 * plain_loss(h, e, targets, weights, z_loss)[0]  # noqa: E731
        actual = jax.jit(jax.value_and_grad(blocked, (0, 1)))(hidden, table)
        assert_same(actual, jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, table), 1e-12)
        total, reported = loss(hidden, table)
        assert_same((total, reported), plain_loss(hidden, table, targets, weights, z_loss), 1e-12)
        embedding = dense_weight(table, TABLE, cpu_mesh(1))
        log_partition, of_targets, _ = scores_of(hidden, embedding, targets, V)
        assert relative_difference(jnp.sum(weights * (log_partition - of_targets)), reported) < 1e-12


@pytest.mark.parametrize("spread", [1.0, 400.0])
def test_logits_far_above_those_of_the_first_block(spread: float) -> None:
    """In float32, where exp overflows unless the true largest logit is found; alike on all devices."""
    hidden, table, targets, weights = inputs(np.float32)
    table[8:] *= spread
    plain = jax.value_and_grad(lambda h, e: plain_loss(h, e, targets, weights, 0.0)[0], (0, 1))(hidden, table)
    assert np.isfinite(plain[0])

    def blocked(mesh):
        settings = LossSettings(V, 8, 8, 0.0)
        function = lambda h, e: loss_on(mesh, h, e, targets, weights, settings)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, table)

    for mesh in (cpu_mesh(1), cpu_mesh(8, fsdp=4, tensor=2)):
        assert_same(blocked(mesh), plain, 1e-5)


@pytest.mark.parametrize("vocab_block", [0, 8])
def test_the_same_on_meshes_that_split_rows_and_vocabulary(vocab_block: int) -> None:
    hidden, table, targets, weights = inputs(np.float32)

    def value_and_gradient(mesh):
        settings = LossSettings(V, 8, vocab_block, 0.01)
        function = lambda h, e: loss_on(mesh, h, e, targets, weights, settings)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, table)

    assert_same_on_meshes(
        value_and_gradient,
        [cpu_mesh(1), cpu_mesh(8, fsdp=4, tensor=2), cpu_mesh(4, tensor=4), cpu_mesh(8, data=2, tensor=2)],
    )


@pytest.mark.parametrize("vocab_block", [0, 1024])
def test_logits_never_exist_whole(vocab_block: int) -> None:
    """The compiled gradient needs less memory than one float32 [B, L, V] tensor; the plain one more."""
    rows, length, vocabulary = 2, 512, 16_384
    whole = 4 * rows * length * vocabulary
    shapes = [((rows, length, 32), jnp.float32), ((vocabulary, 32), jnp.float32)]
    shapes += [((rows, length), jnp.int32), ((rows, length), jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    settings = LossSettings(vocabulary, 64, vocab_block, 0.0)

    def memory(loss) -> int:
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def plain(h, e, t, w):
        log_probs = jax.nn.log_softmax(h @ e.T)
        return -jnp.sum(w * jnp.take_along_axis(log_probs, t[..., None], axis=-1)[..., 0])

    assert memory(lambda h, e, t, w: loss_on(cpu_mesh(1), h, e, t, w, settings)[0]) < whole / 2
    assert memory(plain) > whole
