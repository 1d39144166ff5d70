"""Reads corpora of Parquet files, local or in a bucket, with the texts in one column."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gemma_jax.data.files import reading
from gemma_jax.data.source import Records, Shard, Text, grouped, text_of
from gemma_jax.errors import UserError

_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_ROWS_AT_ONCE = 64
_FOOTERS_AT_ONCE = 16


class Parquet(Records):
    """Parquet files with a document in column `text_field` of each row.

    A shard is the row groups `start` to `stop` of a file. They are read as a stream, one megabyte at once.
    """

    def place(self, shard: Shard, number: int) -> str:
        return f"{shard.files[0]}, row {number}"

    def _cut(self, files: Sequence[tuple[str, int]]) -> list[Shard]:
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:  # because reading one from a bucket is slow
            shards = threads.map(self._cut_file, (file for file, _ in files))
        return [shard for of_file in shards for shard in of_file]

    def _cut_file(self, file: str) -> list[Shard]:
        with _opened(file) as parquet:
            column = self._checked_column(file, parquet)
            groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
            sizes = [group.column(column).total_uncompressed_size for group in groups]
        return [Shard((file,), sum(sizes[part]), part.start, part.stop) for part in grouped(sizes)]

    def _checked_column(self, file: str, parquet: Any) -> int:
        """Returns the index of the text column. Raises UserError if it is missing or holds no strings."""
        import pyarrow

        types = {field.name: field.type for field in parquet.schema_arrow}
        kind = types.get(self._text_field)
        values = kind.value_type if kind is not None and pyarrow.types.is_dictionary(kind) else kind
        if str(values) not in _TEXTS:
            found = "no column" if kind is None else f"{kind} instead of strings in column"
            columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            raise UserError(
                f"{file} has {found} {self._text_field!r}; set data.text_field to one of: {columns}."
            )
        paths = [parquet.schema.column(number).path for number in range(parquet.metadata.num_columns)]
        return paths.index(self._text_field)

    def _records(self, shard: Shard) -> Iterator[tuple[int, bytes | None]]:
        import pyarrow

        with _opened(shard.files[0]) as parquet:
            number = sum(parquet.metadata.row_group(group).num_rows for group in range(shard.start))
            groups = [*range(shard.start, shard.stop)]
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[self._text_field]):
                texts = batch.column(0)
                if pyarrow.types.is_dictionary(texts.type):
                    texts = texts.dictionary_decode()
                # As bytes, because not every writer checks that its strings are UTF-8.
                values = texts.cast(pyarrow.large_binary()).to_pylist()
                yield from enumerate(values, start=number)
                number += len(values)

    def _document(self, record: bytes | None, shard: Shard, number: int) -> Text:
        return text_of(record, f"column {self._text_field!r}", number)


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """Opens a pyarrow ParquetFile. Raises UserError if it is damaged, also while the block reads it."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with reading(file) as stream:
        try:
            yield ParquetFile(stream, buffer_size=2**20, pre_buffer=False)
        except pyarrow.ArrowException as error:
            raise UserError(f"{file} is not a whole Parquet file ({error}); fetch it again.") from error
