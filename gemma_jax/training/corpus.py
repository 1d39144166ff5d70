"""Prepares the tokenizer and the rows of a run's corpus, and evaluates the held-out documents."""

import functools
import hashlib
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from gemma_jax.config import TrainingConfig
from gemma_jax.data.documents import open_sources, sample_texts
from gemma_jax.data.loader import Dataset, prepare
from gemma_jax.data.source import Source
from gemma_jax.data.storage import cache_error
from gemma_jax.model import ModelSpec
from gemma_jax.paths import LARGE_FILE, read_bytes, read_text, user_path
from gemma_jax.sharding import local_rows
from gemma_jax.tokenizer import Tokenizer
from gemma_jax.training.evaluation import Evaluator, mean_over
from gemma_jax.training.metrics import say
from gemma_jax.training.objectives import Objective, held_out_loss

_SECONDS_BETWEEN_LINES = 5


def corpus_tokenizer(config: TrainingConfig, megabytes: float) -> Tokenizer:
    """Trains a tokenizer on the corpus of a config, or loads it from the cache if it was trained before.

    Args:
      config: The config of the run.
      megabytes: How many megabytes of text to train it on.

    Raises:
      UserError: The corpus cannot be read, or the cache cannot be written.
    """
    data = config.data
    sources = open_sources(data)
    settings = (config.model.vocab_size, megabytes, data.held_out)
    identity = "\n".join([*(source.fingerprint for source in sources), *map(str, settings)])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = user_path(data.cache_dir) / "tokenizers"
    path, digest = folder / f"{key}.model", folder / f"{key}.sha256"
    if path.exists() and digest.exists():
        cached = read_bytes(path, LARGE_FILE)
        if hashlib.sha256(cached).hexdigest() == read_text(digest, errors="replace"):
            return Tokenizer(cached, str(path))
    say(f"training a tokenizer of {config.model.vocab_size} pieces on {', '.join(data.sources)}")
    try:  # before the training, which can take minutes
        folder.mkdir(parents=True, exist_ok=True)
        digest.unlink(missing_ok=True)
        texts = sample_texts(sources, megabytes, data.held_out)
        tokenizer = Tokenizer.train(texts, config.model.vocab_size, path)
        digest.write_text(tokenizer.fingerprint)
    except OSError as error:
        raise cache_error(path, error) from error
    return tokenizer


class _Progress:
    """Prints the progress of tokenising."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()
        self._bytes = self._tokens = 0

    def __call__(self, total: int, num_bytes: int, tokens: int) -> None:
        """Counts one tokenised shard. `total` is the size of all corpora in bytes."""
        self._bytes += num_bytes
        self._tokens += tokens
        now = time.monotonic()
        if now - self._printed >= _SECONDS_BETWEEN_LINES and self._tokens:
            self._printed = now
            speed = self._tokens / (now - self._started)
            say(f"tokenising: {self._bytes / 1e6:,.0f} of {total / 1e6:,.0f} MB, {speed:,.0f} tokens/s")


def prepare_corpus(
    config: TrainingConfig, tokenizer: Tokenizer, sources: Sequence[Source] | None = None
) -> Dataset:
    """Returns the rows of a config's corpus. All processes of the job share the work of tokenising it.

    Sources of examples replace those that data.sources names.

    Raises:
      UserError: For the same reasons as in `prepare`.
    """
    dataset = prepare(
        config.data,
        tokenizer,
        config.seed,
        _Progress(),
        sources=sources,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for statistics in dataset.statistics:
        for sentence in statistics.sentences():
            say(sentence)
    return dataset


def evaluator_of(
    objective: Objective, config: TrainingConfig, model: ModelSpec, dataset: Dataset
) -> list[Evaluator]:
    """Returns the evaluator of an objective on what is held out.

    The list is empty if nothing is held out or evaluation is off.
    """
    every, size = config.evaluation.every, config.data.batch_size
    if not dataset.held_out.num_rows or not every:
        return []
    batches = functools.partial(
        dataset.held_out.batches, size, config.evaluation.rows, local_rows(size, model.mesh)
    )
    return [Evaluator("held_out", every, mean_over(model, objective, batches, size))]


def held_out_evaluators(
    config: TrainingConfig, mesh: Mesh, dataset: Dataset, tokenizer: Tokenizer
) -> list[Evaluator]:
    """Returns the evaluator of held-out documents, if there are any: nats per token and bits per byte."""
    model = ModelSpec(config.model, config.compute, mesh)
    return evaluator_of(held_out_loss(tokenizer.piece_bytes()), config, model, dataset)
