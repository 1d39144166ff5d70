"""Reads ArrayRecord files of text or token ids, and TFDS datasets. Never imports TensorFlow."""

import contextlib
import dataclasses
import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_jax.data import source as source_module
from gemma_jax.data.files import reading
from gemma_jax.data.source import BadRecord, Records, Shard, TokenIds
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_RECORDS_AT_ONCE = 64


class _ArrayRecords(Records):
    """Records of ArrayRecord files. A file in a bucket is one shard, copied to this machine for reading."""

    def _cut(self, files: Sequence[tuple[str, int]]) -> list[Shard]:
        return [shard for file, size in files for shard in self._cut_file(file, size)]

    def _cut_file(self, file: str, size: int) -> Iterator[Shard]:
        if "://" in file:
            yield Shard((file,), size)
            return
        records = _number_of_records(file)
        step = max(1, records * source_module.SHARD_BYTES // max(size, 1))
        for start in range(0, records, step):
            stop = min(start + step, records)
            yield Shard((file,), size * (stop - start) // records, start, stop)

    def _records(self, shard: Shard) -> Iterator[tuple[int, Any]]:
        (file,) = shard.files
        if "://" not in file:
            yield from self._records_on_disk(shard, file)
            return
        with tempfile.TemporaryDirectory(prefix="array_record.") as folder:
            copy = os.path.join(folder, "copy.array_record")
            with reading(file) as stream, open(copy, "wb") as target:
                shutil.copyfileobj(stream, target, 2**20)
            whole = dataclasses.replace(shard, stop=_number_of_records(copy, file))
            yield from self._records_on_disk(whole, copy)

    def _records_on_disk(self, shard: Shard, path: str) -> Iterator[tuple[int, Any]]:
        """Yields the records of a shard, read from `path`: the shard's own file or a local copy of it."""
        for start in range(shard.start, shard.stop, _RECORDS_AT_ONCE):
            try:
                with _opened(path) as reader:
                    records = list(reader.read(start, min(start + _RECORDS_AT_ONCE, shard.stop)))
            except (OSError, RuntimeError, ValueError, IndexError) as error:
                raise UserError(
                    f"{shard.files[0]} cannot be read at records from {start} ({error}); fetch it again."
                ) from error
            yield from enumerate(records, start=start)

    def place(self, shard: Shard, number: int) -> str:
        return f"{shard.files[0]}, record {number}"


class TextRecords(_ArrayRecords):
    """ArrayRecord files of UTF-8 texts, or of tf.train.Example protos as TFDS writes them.

    The fields of a proto are its features. Those of a sequence, which TFDS writes as `messages/role` and
    `messages/content`, are also a list of dicts, `messages`.

    The first record of a file decides: if it parses as a proto, all records of the file are protos. A text
    can be mistaken for a proto only if it starts with a newline and its next bytes match its nested lengths.
    """

    def _records_on_disk(self, shard: Shard, path: str) -> Iterator[tuple[int, Any]]:
        is_example = shard.stop > 0 and _first_is_example(path)
        for number, record in super()._records_on_disk(shard, path):
            yield number, (is_example, record)

    def _fields(self, record: tuple[bool, bytes]) -> dict[str, Any]:
        is_example, content = record
        if not is_example:
            return {self.text_field: content}
        try:
            features = parse_example(content)
        except ValueError as error:
            raise BadRecord(f"not a tf.train.Example ({error})") from error
        fields: dict[str, Any] = {}
        for name, values in features.items():
            fields[name] = values[0] if len(values) == 1 else values
            sequence, _, key = name.rpartition("/")
            elements = fields.setdefault(sequence, [{} for _ in values]) if sequence else []
            for element, value in zip(elements, values, strict=False):
                element[key] = value
        return fields


class TokenRecords(_ArrayRecords):
    """ArrayRecord files in which each record holds one document's token ids, little-endian uint16 or uint32.

    One leading bos and one trailing eos are dropped, because packing adds its own. Other control ids are an
    error, because a document cannot hold them.
    """

    def __init__(self, name: str, files: Sequence[str], dtype: str, bad_records: str):
        super().__init__(name, files, "", bad_records, dtype)
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def _fields(self, record: bytes) -> dict[str, Any]:
        raise BadRecord("token ids, which have no fields")

    def _document(self, record: bytes, number: int) -> TokenIds:
        if len(record) % self._dtype.itemsize:
            raise BadRecord(f"{len(record)} bytes are no whole number of {self._dtype.name} token ids")
        return TokenIds(np.frombuffer(record, self._dtype).astype(np.int64), number)


def open_tfds(spec: str, text_field: str, bad_records: str, *, all_fields: bool = False) -> TextRecords:
    """Opens the train split of a TFDS dataset that was prepared in the ArrayRecord format.

    Raises UserError if it was not, or has no train split or, unless `all_fields`, no feature `text_field`.
    """
    info = find_builder(spec).info
    splits = dict(info.splits)
    if "train" not in splits:
        raise UserError(f"{spec} has no train split; its splits are: {', '.join(splits) or 'none'}.")
    features = list(info.features or ())
    if text_field not in features and not all_fields:
        raise UserError(
            f"{spec} has no feature {text_field!r}; set data.text_field to one of: {', '.join(features)}."
        )
    if info.file_format is None or info.file_format.value != "array_record":
        raise UserError(
            f"{spec} was not prepared as ArrayRecord files; prepare it with "
            "download_and_prepare(file_format='array_record')."
        )
    files = [os.fspath(path) for path in splits["train"].filepaths]
    return TextRecords(spec, files, text_field, bad_records, all_fields=all_fields)


def find_builder(spec: str) -> "tfds.core.DatasetBuilder":
    """Returns the TFDS builder of `tfds:NAME` or of a directory.

    Raises UserError if it is unknown or cannot be opened, or if its data is not prepared.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{spec} needs the tensorflow-datasets package: pip install it.") from error
    try:
        if not spec.startswith("tfds:"):
            return tfds.builder_from_directory(spec)
        builder = tfds.builder(spec.removeprefix("tfds:"))
    except tfds.core.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(spec.removeprefix("tfds:"), names, 1)
        remedy = f"did you mean tfds:{near[0]}?" if near else "tfds.list_builders() lists the names."
        raise UserError(f"no corpus {spec!r}: TFDS has no dataset of this name; {remedy}") from error
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{spec} cannot be opened; TFDS says: {reason}") from error
    if not builder.is_prepared():
        raise UserError(
            f"{spec} is not prepared in {builder.data_dir}; prepare it there with "
            "tfds.builder(NAME).download_and_prepare(file_format='array_record')."
        )
    return builder


def parse_example(record: bytes) -> dict[str, list[bytes]]:
    """Parses a serialised tf.train.Example. Returns its features as lists of byte strings.

    A feature of numbers becomes an empty list. The parser follows the format's definition
    (tensorflow/core/example/feature.proto): Example.features = 1, Features.feature = 1, map entries key = 1
    and value = 2, Feature.bytes_list = 1, BytesList.value = 1.
    Raises ValueError if the record is anything else.
    """
    features: dict[str, list[bytes]] = {}
    for outer_number, outer in _proto_fields(record):
        for number, entry in _proto_fields(outer):
            pair = dict(_proto_fields(entry))
            if outer_number != 1 or number != 1 or not pair.keys() <= {1, 2}:
                raise ValueError("unknown proto fields")
            lists = [values for kind, values in _proto_fields(pair.get(2, b"")) if kind == 1]
            features[pair.get(1, b"").decode("utf-8")] = [
                value for values in lists for _, value in _proto_fields(values)
            ]
    if not features:
        raise ValueError("no features")
    return features


def _proto_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the field numbers and contents of a proto message that holds length-delimited fields only.

    Raises ValueError for any other message.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        length, position = _varint(message, position)
        if tag & 7 != 2 or position + length > len(message):
            raise ValueError("not a proto of length-delimited fields")
        yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number that does not end")


def _first_is_example(file: str) -> bool:
    try:
        with _opened(file) as reader:
            return bool(parse_example(reader.read(0, 1)[0]))
    except (ValueError, RecursionError):
        return False


def _number_of_records(file: str, name: str = "") -> int:
    """Returns the number of records in a file, which error messages call `name`."""
    try:
        with _opened(file) as reader:
            return int(reader.num_records())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{name or file} is not an ArrayRecord file ({error}); fetch it again.") from error


def _opened(file: str) -> "contextlib.closing[Any]":
    from array_record.python.array_record_module import ArrayRecordReader

    return contextlib.closing(ArrayRecordReader(file))
