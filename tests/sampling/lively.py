"""A tiny model whose text depends on all that came before, and what tests of generation do with it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import log_softmax

from gemma_jax import Gemma
from gemma_jax.config import SamplingConfig
from gemma_jax.sampling import Completion, Generator, Request, complete_requests
from gemma_jax.sampling.requests import requests_of
from gemma_jax.sharding import named_arrays, with_arrays
from gemma_jax.testing import tiny_gemma

VOCAB = 500  # the embedding has 512 rows: twelve of padding
PROMPTS = [[2, 17, 300], [2, 5, 5, 99, 420, 7, 8, 9, 10, 11, 12], [2, 250, 1, 3, 77, 6, 499], [2]]
NEW = 12


def lively_gemma(mesh: Mesh, **changes: Any) -> Gemma:
    """A tiny Gemma whose next token depends on all that came before.

    With norm scales of zero and tied embeddings, a random model mostly repeats its last token, and a
    fault in the cache would not show.
    """
    gemma = tiny_gemma(mesh, vocab_size=VOCAB, **changes)
    arrays, rng = named_arrays(gemma.params), np.random.default_rng(0)
    for name, value in arrays.items():
        if name.endswith("norm"):
            changed = rng.normal(-1 if name == "final_norm" else 1, 1, value.shape).astype(np.float32)
            arrays[name] = jax.device_put(changed, value.sharding)
    return Gemma(gemma.spec, with_arrays(gemma.params, arrays), None)


def generator_of(gemma: Gemma, **changes: Any) -> Generator:
    config = dataclasses.replace(gemma.config, **changes)
    return Generator(dataclasses.replace(gemma.spec, config=config), gemma.params)


def complete(
    generator: Generator,
    prompts: Sequence[list[int]],
    config: SamplingConfig,
    end_tokens: Sequence[int] = (),
    rows: int = 0,
) -> list[Completion]:
    """What there is of each completion at the end."""
    return run(generator, requests_of(prompts, config, end_tokens), rows)


def run(generator: Generator, requests: Sequence[Request], rows: int = 0) -> list[Completion]:
    completions = [Completion() for _ in requests]
    for _ in complete_requests(generator, requests, completions, rows=rows):
        pass
    return completions


def logits_at(
    gemma: Gemma, prompts: Sequence[list[int]], completions: Sequence[Completion], length: int = 32
) -> list[np.ndarray]:
    """Returns for each row the logits that one forward pass has at its new tokens, [new tokens, V]."""
    rows = [prompt + completion.token_ids for prompt, completion in zip(prompts, completions, strict=True)]
    # One shape, one compilation; causality makes the padding harmless.
    padded = np.zeros((len(rows), length), int)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens)] = tokens
    logits = gemma.logits(padded)
    assert logits.shape == (len(rows), length, VOCAB) and logits.dtype == np.float32
    return [
        logits[row, len(prompt) - 1 : len(tokens) - 1].astype(np.float64)
        for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True))
    ]


def predictions(
    gemma: Gemma, prompts: Sequence[list[int]], completions: Sequence[Completion], length: int = 32
) -> list[np.ndarray]:
    """Returns the log-probabilities of `logits_at`."""
    return [log_softmax(logits, axis=-1) for logits in logits_at(gemma, prompts, completions, length)]
