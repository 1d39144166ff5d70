"""Reads corpora of Parquet files, local or in a bucket, with the texts in one column."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gemma_jax.data.files import reading
from gemma_jax.data.source import BadRecord, Records, Shard, grouped
from gemma_jax.errors import UserError

_TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_ROWS_AT_ONCE = 64
_FOOTERS_AT_ONCE = 16


class Parquet(Records):
    """Parquet files. The fields of a record are the columns of a row.

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
            column = None if self._all_fields else self._checked_column(file, parquet)
            groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
            sizes = [
                group.total_byte_size if column is None else group.column(column).total_uncompressed_size
                for group in groups
            ]
        return [Shard((file,), sum(sizes[part]), part.start, part.stop) for part in grouped(sizes)]

    def _checked_column(self, file: str, parquet: Any) -> int:
        """Returns the index of the text column. Raises UserError if it is missing or holds no strings."""
        import pyarrow

        types = {field.name: field.type for field in parquet.schema_arrow}
        kind = types.get(self.text_field)
        values = kind.value_type if kind is not None and pyarrow.types.is_dictionary(kind) else kind
        if str(values) not in _TEXTS:
            found = "no column" if kind is None else f"{kind} instead of strings in column"
            columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            raise UserError(
                f"{file} has {found} {self.text_field!r}; set data.text_field to one of: {columns}."
            )
        paths = [parquet.schema.column(number).path for number in range(parquet.metadata.num_columns)]
        return paths.index(self.text_field)

    def _records(self, shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
        columns = None if self._all_fields else [self.text_field]
        with _opened(shard.files[0]) as parquet:
            number = sum(parquet.metadata.row_group(group).num_rows for group in range(shard.start))
            groups = [*range(shard.start, shard.stop)]
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns):
                for row in range(batch.num_rows):
                    yield number, {name: batch.column(name)[row] for name in batch.schema.names}
                    number += 1

    def _fields(self, record: dict[str, Any]) -> dict[str, Any]:
        return {name: _python_value(name, value) for name, value in record.items()}


def _python_value(name: str, scalar: Any) -> Any:
    """Returns the value of a pyarrow scalar. Raises BadRecord if it cannot be expressed in Python.

    Not every writer of Parquet checks that its strings are UTF-8.
    """
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise BadRecord(f"column {name!r} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, OverflowError) as error:  # a time that Python cannot express
        raise BadRecord(f"column {name!r} cannot be read ({error})") from error


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
