"""Log-probabilities of given tokens, computed in batches of a few shapes, so that few programs are compiled.

Shape legend: B rows, L tokens.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.model import ModelSpec
from gemma_jax.model.scoring import token_log_probs
from gemma_jax.sampling.requests import Request, bucket, check_ids, padded, row_bucket
from gemma_jax.sharding import batch_sharding, row_parts
from gemma_jax.weights import Context

BATCH_TOKENS = 4096  # tokens, with padding, in each part that a batch is split into; one row may have more


class Scorer:
    """A model with its compiled scoring program."""

    def __init__(self, spec: ModelSpec, params: nnx.State) -> None:
        self._spec, self._params = spec, params
        self._program = jax.jit(self._log_probs)

    def score(self, sequences: Sequence[Sequence[int]], adapters: Sequence[int]) -> list[list[float]]:
        """Returns the log-probabilities of each sequence's tokens after the first, given those before them.

        The unit is nats. Sequences of similar length share a batch. No [B, L, V] array of logits is made.
        `adapters` has the index of each sequence's adapter.

        Raises:
          UserError: a sequence is empty or longer than the context, or an id is out of range.
        """
        config, parts = self._spec.config, row_parts(self._spec.mesh)
        by_length: dict[int, list[int]] = {}
        for number, ids in enumerate(sequences):
            check_ids(ids, config)
            by_length.setdefault(min(bucket(len(ids) - 1), config.context_length), []).append(number)
        scores: list[list[float]] = [[] for _ in sequences]
        for length, numbers in by_length.items():
            rows = max(1, BATCH_TOKENS // length) * parts
            for start in range(0, len(numbers), rows):
                batch = numbers[start : start + rows]
                chosen = [adapters[number] for number in batch]
                of_batch = self._score_batch([sequences[number] for number in batch], length, chosen)
                for number, of_row in zip(batch, of_batch, strict=True):
                    scores[number] = of_row
        return scores

    def prompts(self, requests: Iterable[Request]) -> dict[int, list[float]]:
        """Returns the scores of the requests' prompts by `Request.prompt`; each is computed once."""
        distinct = {request.prompt: request for request in requests}
        ids = [request.token_ids for request in distinct.values()]
        scores = self.score(ids, [request.adapter for request in distinct.values()])
        return dict(zip(distinct, scores, strict=True))

    def _score_batch(
        self, sequences: Sequence[Sequence[int]], length: int, adapters: Sequence[int]
    ) -> list[list[float]]:
        mesh = self._spec.mesh
        tokens, lengths = padded(sequences, row_bucket(len(sequences), row_parts(mesh)), length + 1)
        chosen = np.zeros(len(tokens), np.int32)
        chosen[: len(adapters)] = adapters
        inputs = jax.device_put((tokens[:, :-1], tokens[:, 1:], lengths - 1, chosen), batch_sharding(mesh))
        log_probs = np.asarray(self._program(self._params, *inputs))
        return [log_probs[row, : len(ids) - 1].tolist() for row, ids in enumerate(sequences)]

    def _log_probs(
        self,
        params: nnx.State,
        tokens: jax.Array,
        targets: jax.Array,
        lengths: jax.Array,
        adapters: jax.Array,
    ) -> jax.Array:
        """Returns the targets' log-probabilities [B, L]; values beyond a row's length are meaningless."""
        model = self._spec.merge(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        context = Context(adapters=adapters)
        return token_log_probs(model, model(tokens, positions, segments, context), targets, context)
