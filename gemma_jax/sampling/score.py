"""Log-probabilities of given tokens, in batches of few shapes.

Shape legend: B rows, L tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.model.scoring import token_log_probs
from gemma_jax.sampling.generate import bucket, check_ids, row_bucket
from gemma_jax.sharding import batch_sharding, row_parts

BATCH_TOKENS = 4096  # of each part that a batch is split into, padding included; a row may have more


class Scorer:
    """A model with its compiled scoring."""

    def __init__(self, spec: ModelSpec, params: nnx.State) -> None:
        self._spec, self._params = spec, params
        self._program = jax.jit(self._log_probs)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token of each sequence, but for its first, given those before it; in nats.

        Sequences of similar length share a batch. No [B, L, V] array of logits ever exists.

        Raises:
          UserError: a sequence that is empty or longer than the context, an id out of range.
        """
        config, parts = self._spec.config, row_parts(self._spec.mesh)
        for ids in sequences:
            if not 0 < len(ids) <= config.context_length:
                raise UserError(
                    f"a sequence to score has {len(ids)} tokens, but must have at least 1 and at most the "
                    f"model's context of {config.context_length}; shorten it."
                )
            check_ids(ids, config.vocab_size)
        by_length: dict[int, list[int]] = {}
        for number, ids in enumerate(sequences):
            if len(ids) > 1:
                by_length.setdefault(min(bucket(len(ids) - 1), config.context_length), []).append(number)
        scores: list[list[float]] = [[] for _ in sequences]
        for length, numbers in by_length.items():
            rows = max(1, BATCH_TOKENS // length) * parts
            for start in range(0, len(numbers), rows):
                batch = numbers[start : start + rows]
                of_batch = self._score_batch([sequences[number] for number in batch], length)
                for number, of_row in zip(batch, of_batch, strict=True):
                    scores[number] = of_row
        return scores

    def _score_batch(self, sequences: Sequence[Sequence[int]], length: int) -> list[list[float]]:
        mesh = self._spec.mesh
        tokens = np.zeros((row_bucket(len(sequences), row_parts(mesh)), length + 1), np.int32)
        lengths = np.zeros(len(tokens), np.int32)
        for row, ids in enumerate(sequences):
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids) - 1
        inputs = jax.device_put((tokens[:, :-1], tokens[:, 1:], lengths), batch_sharding(mesh))
        log_probs = np.asarray(self._program(self._params, *inputs))
        return [log_probs[row, : len(ids) - 1].tolist() for row, ids in enumerate(sequences)]

    def _log_probs(
        self, params: nnx.State, tokens: jax.Array, targets: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        """[B, L] of the targets; those beyond a row's length mean nothing."""
        model = self._spec.merge(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        return token_log_probs(model, model(tokens, positions, segments), targets)
