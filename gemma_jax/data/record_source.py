"""Corpora of records: ArrayRecord files of text or token ids, and TFDS datasets. Never imports TensorFlow."""

import abc
import dataclasses
import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from gemma_jax.data import source as source_module
from gemma_jax.data.files import reading, size_and_time
from gemma_jax.data.source import (
    BadRecord,
    Document,
    OnSkip,
    Shard,
    Source,
    Text,
    TokenIds,
    hash_of,
    refuse_or_skip,
    text_of,
)
from gemma_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_RECORDS_AT_ONCE = 64


class _Records(Source):
    """Records that are read by number."""

    bad_records: str

    @abc.abstractmethod
    def _read_records(self, shard: Shard, start: int, stop: int) -> Sequence[object]:
        """The records `start` to `stop` of the shard's file."""

    @abc.abstractmethod
    def _document(self, record: object, shard: Shard, number: int) -> Document:
        """The document in a record. Raises BadRecord."""

    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        for start in range(shard.start, shard.stop, _RECORDS_AT_ONCE):
            try:
                records = self._read_records(shard, start, min(start + _RECORDS_AT_ONCE, shard.stop))
            except (OSError, RuntimeError, ValueError, IndexError) as error:
                raise UserError(
                    f"{shard.files[0]} cannot be read at records from {start} ({error}); fetch it again."
                ) from error
            for number, record in enumerate(records, start=start):
                try:
                    document = self._document(record, shard, number)
                except BadRecord as error:
                    refuse_or_skip(f"{self.place(shard, number)}: {error}", self.bad_records, on_skip)
                    continue
                if not document.is_empty:
                    yield document

    def place(self, shard: Shard, number: int) -> str:
        return f"{shard.files[0]}, record {number}"


class _ArrayRecords(_Records):
    """Records of ArrayRecord files. One in a bucket is a shard, and is copied to this machine to be read."""

    def __init__(self, name: str, files: Sequence[str], bad_records: str, *settings: str):
        self.name = name
        self.bad_records = bad_records
        listing = [(file, *size_and_time(file)) for file in files]
        self.fingerprint = hash_of("array_record", bad_records, settings, listing)
        self.shards = [
            shard
            for file, size, _ in listing
            for shard in (
                [Shard((file,), size)]
                if "://" in file
                else _record_shards(file, _number_of_records(file), size)
            )
        ]
        self._copies: dict[str, str] = {}

    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        (file,) = shard.files
        if "://" not in file:
            yield from super().read(shard, on_skip)
            return
        with tempfile.TemporaryDirectory(prefix="array_record.") as folder:
            copy = self._copies[file] = os.path.join(folder, "copy.array_record")
            with reading(file) as stream, open(copy, "wb") as target:
                shutil.copyfileobj(stream, target, 2**20)
            try:
                records = _number_of_records(copy, file)
                yield from super().read(dataclasses.replace(shard, stop=records), on_skip)
            finally:
                del self._copies[file]

    def on_disk(self, file: str) -> str:
        """Where a file can be read from while its shard is."""
        return self._copies.get(file, file)

    def _read_records(self, shard: Shard, start: int, stop: int) -> Sequence[bytes]:
        return _read_array_record(self.on_disk(shard.files[0]), start, stop)


class TextRecords(_ArrayRecords):
    """ArrayRecord files whose records are a document's UTF-8 text, or tf.train.Example protos as TFDS writes.

    Which of the two a file holds is decided by its first record: it holds protos if that is one. A text can
    only look like a proto if it starts with a newline and its next bytes spell its own nested lengths.
    """

    def __init__(self, name: str, files: Sequence[str], text_field: str, bad_records: str):
        super().__init__(name, files, bad_records, "text", text_field)
        self._text_field = text_field
        self._examples: dict[str, bool] = {}

    def _document(self, record: object, shard: Shard, number: int) -> Document:
        assert isinstance(record, bytes)
        (file,) = shard.files
        if file not in self._examples:
            self._examples[file] = _first_is_example(self.on_disk(file))
        if not self._examples[file]:
            return text_of(record, "the record", number)
        return _text_of_example(record, self._text_field, number)


class TokenRecords(_ArrayRecords):
    """ArrayRecord files whose records are one document's token ids each: raw little-endian uint16 or uint32.

    One bos in front and one eos behind are dropped, because packing adds its own; other control ids are an
    error, for a document cannot hold them.
    """

    def __init__(self, name: str, files: Sequence[str], dtype: str, bad_records: str):
        super().__init__(name, files, bad_records, "tokens", dtype)
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def _document(self, record: object, shard: Shard, number: int) -> Document:
        assert isinstance(record, bytes)
        if len(record) % self._dtype.itemsize:
            raise BadRecord(f"{len(record)} bytes are no whole number of {self._dtype.name} token ids")
        return TokenIds(np.frombuffer(record, self._dtype).astype(np.int64), number)


class TfdsRecords(_Records):
    """The train split of a TFDS dataset that was prepared in the ArrayRecord format."""

    def __init__(self, spec: str, text_field: str, bad_records: str):
        builder = find_builder(spec)
        try:
            splits = dict(builder.info.splits)
            if "train" not in splits:
                raise UserError(f"{spec} has no train split; its splits are: {', '.join(splits) or 'none'}.")
            features = list(builder.info.features or ())
            if text_field not in features:
                raise UserError(
                    f"{spec} has no feature {text_field!r}; "
                    f"set data.text_field to one of: {', '.join(features)}."
                )
            import tensorflow_datasets as tfds

            # Raw records, for TFDS would decode every feature of each, pictures too, to give one text.
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._records = builder.as_data_source(split="train", deserialize_method=raw)
        except NotImplementedError as error:
            raise UserError(
                f"{spec} was not prepared as ArrayRecord files; prepare it with "
                "download_and_prepare(file_format='array_record')."
            ) from error
        self.name = spec
        self.bad_records = bad_records
        self._text_field = text_field
        split = splits["train"]
        stats = [(os.fspath(path), epath.Path(path).stat()) for path in split.filepaths]
        self.fingerprint = hash_of(
            "tfds",
            builder.info.full_name,
            text_field,
            bad_records,
            [(path, stat.length, int(stat.mtime)) for path, stat in stats],
        )
        self.shards = list(_record_shards(spec, len(self._records), split.num_bytes))

    def _read_records(self, shard: Shard, start: int, stop: int) -> Sequence[object]:
        return list(self._records.__getitems__(range(start, stop)))

    def _document(self, record: object, shard: Shard, number: int) -> Document:
        assert isinstance(record, bytes)
        return _text_of_example(record, self._text_field, number)


def find_builder(spec: str) -> "tfds.core.DatasetBuilder":
    """The TFDS builder of `tfds:NAME` or of a directory. Raises UserError if its data is not prepared."""
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
        raise UserError(f"No corpus {spec!r}: TFDS has no dataset of this name; {remedy}") from error
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{spec} cannot be opened; TFDS says: {reason}") from error
    if not builder.is_prepared():
        raise UserError(
            f"{spec} is not prepared in {builder.data_dir}; prepare it there with "
            "tfds.builder(NAME).download_and_prepare(file_format='array_record')."
        )
    return builder


def _text_of_example(record: bytes, text_field: str, number: int) -> Text:
    try:
        features = parse_example(record)
    except ValueError as error:
        raise BadRecord(f"not a tf.train.Example ({error})") from error
    values = features.get(text_field)
    if values is None:
        raise BadRecord(
            f"no feature {text_field!r} (data.text_field); its features are: {', '.join(features)}"
        )
    if len(values) != 1:
        raise BadRecord(f"feature {text_field!r} is not one string but {len(values)}")
    return text_of(values[0], f"feature {text_field!r}", number)


def parse_example(record: bytes) -> dict[str, list[bytes]]:
    """The features of a serialised tf.train.Example, as lists of byte strings (numbers give an empty list).

    Written against the format's definition (tensorflow/core/example/feature.proto): Example.features = 1,
    Features.feature = 1, map entries key = 1 and value = 2, Feature.bytes_list = 1, BytesList.value = 1.
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
    """Field numbers and contents of a proto message that holds length-delimited fields only."""
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
        return bool(parse_example(_read_array_record(file, 0, 1)[0]))
    except (ValueError, RecursionError):
        return False


def _number_of_records(file: str, name: str = "") -> int:
    """Of a file that is called `name` in messages."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(file)
        try:
            return int(reader.num_records())
        finally:
            reader.close()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{name or file} is not an ArrayRecord file ({error}); fetch it again.") from error


def _read_array_record(file: str, start: int, stop: int) -> list[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(file)
    try:
        return list(reader.read(start, stop))
    finally:
        reader.close()


def _record_shards(file: str, records: int, size: int) -> Iterator[Shard]:
    step = max(1, records * source_module.SHARD_BYTES // max(size, 1))
    for start in range(0, records, step):
        stop = min(start + step, records)
        yield Shard((file,), size * (stop - start) // records, start, stop)
