"""Reads data sets through the `datasets` package of Hugging Face, if it is installed."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_jax.data import source as source_module
from gemma_jax.data.source import Records, Shard, hash_of
from gemma_jax.errors import UserError

_ROWS_AT_ONCE = 64


class HuggingFaceDataset(Records):
    """A split of a data set. A shard is the rows `start` to `stop`."""

    def __init__(self, name: str, text_field: str, bad_records: str):
        """Opens the data set, which is downloaded if it is not in the cache of `datasets`."""
        self._dataset = find_dataset(name)
        super().__init__(name, [], text_field, bad_records)
        self.fingerprint = hash_of(self.fingerprint, self._dataset._fingerprint, len(self._dataset))

    def place(self, shard: Shard, number: int) -> str:
        return f"{self.name}, row {number}"

    def _cut(self, files: Sequence[tuple[str, int]]) -> list[Shard]:
        rows = len(self._dataset)
        size = self._dataset.data.nbytes
        step = max(1, rows * source_module.SHARD_BYTES // max(size, 1))
        spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        return [Shard((self.name,), size * (stop - start) // rows, start, stop) for start, stop in spans]

    def _records(self, shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
        for start in range(shard.start, shard.stop, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, shard.stop)
            yield from enumerate(self._dataset.select(range(start, stop)), start=start)

    def _fields(self, record: dict[str, Any]) -> dict[str, Any]:
        return record


def find_dataset(spec: str) -> Any:
    """Returns the data set `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`.

    NAME is one on the Hub, or a local folder. The split is train by default. Code that comes with a data set
    is never run.

    Raises:
      UserError: The package is not installed, or the data set cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{spec} needs the datasets package: pip install datasets.") from error
    name, *rest = spec.removeprefix("hf:").split(":")
    *config, split = rest or ["train"]
    try:
        return datasets.load_dataset(os.path.expanduser(name), *config[:1], split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{spec} cannot be opened; datasets says: {reason}") from error
