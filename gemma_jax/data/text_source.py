"""Corpora of text files and of JSON lines, local or in a bucket, also compressed."""

import codecs
import hashlib
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from gemma_jax.data import source as source_module
from gemma_jax.data.files import is_compressed, reading, size_and_time, unreadable
from gemma_jax.data.source import (
    BadRecord,
    Document,
    LongText,
    OnSkip,
    Shard,
    Source,
    Text,
    cut_position,
    hash_of,
    refuse_or_skip,
    text_of,
)
from gemma_jax.errors import UserError

LONG_FILE_BYTES = 16 * 2**20
"""Text files from here on are read in blocks, never whole."""

_READ_BYTES = 2**20


class PythonStdlib(Source):
    """The Python sources of this installation's standard library, tests included, installed packages not.

    Files are read by Python's own rules (PEP 263). The few that these rules cannot decode are the standard
    library's own tests of bad encodings: they are skipped and counted whatever bad_records says.
    """

    def __init__(self, name: str):
        self.name = name
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(
            path
            for path in root.rglob("*.py")
            if not {"site-packages", "dist-packages"}.intersection(path.relative_to(root).parts)
        )
        stats = [(path, path.stat()) for path in files if path.is_file()]
        if not stats:
            raise UserError(f"{name}: this Python has no source files under {root}; name another corpus.")
        listing = [(str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        self.fingerprint = hash_of("python-stdlib", sys.version, listing)
        self.shards = _group_files([(str(path), stat.st_size) for path, stat in stats])

    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        for number, file in enumerate(shard.files):
            try:
                with tokenize.open(file) as stream:
                    text = stream.read()
            except (SyntaxError, UnicodeDecodeError) as error:
                on_skip(f"{file}: {error}")
                continue
            except OSError as error:
                raise unreadable(file, error) from error
            if text:
                yield Text(text, number)

    def place(self, shard: Shard, number: int) -> str:
        return shard.files[number]


class TextFiles(Source):
    """Files of UTF-8 text, one document each, unchanged down to their line ends."""

    def __init__(self, name: str, files: Sequence[str], bad_records: str):
        self.name = name
        self._bad_records = bad_records
        listing = [(file, *size_and_time(file)) for file in files]
        self.fingerprint = hash_of("text", bad_records, listing)
        self.shards = _group_files([(file, size) for file, size, _ in listing])

    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        for number, file in enumerate(shard.files):
            try:
                with reading(file) as stream:
                    content = stream.read(LONG_FILE_BYTES)
                    long = bool(stream.read(1))
                document = _LongFile(file, number) if long else Text(content.decode("utf-8"), number)
            except UnicodeDecodeError as error:
                problem = f"{file} is not UTF-8 text: {error.reason} at byte {error.start}"
                refuse_or_skip(problem, self._bad_records, on_skip)
                continue
            if not document.is_empty:
                yield document

    def place(self, shard: Shard, number: int) -> str:
        return shard.files[number]


class _LongFile(LongText):
    """A text file that is read once to check and hash it, and again for its blocks."""

    def __init__(self, file: str, number: int):
        """Raises UnicodeDecodeError with the offset in the file."""
        self._file = file
        self.number = number
        digest = hashlib.blake2b(digest_size=8)
        self.num_bytes = 0
        for text in self._decoded():
            encoded = text.encode("utf-8")
            digest.update(encoded)
            self.num_bytes += len(encoded)
        self.digest = digest.digest()

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        done = 0
        with reading(self._file) as stream:
            while True:
                content = stream.read(_READ_BYTES)
                kept = len(decoder.getstate()[0])
                try:
                    yield decoder.decode(content, final=not content)
                except UnicodeDecodeError as error:
                    offset = done - kept + error.start
                    raise UnicodeDecodeError("utf-8", b"", offset, offset + 1, error.reason) from error
                if not content:
                    return
                done += len(content)

    def blocks(self) -> Iterator[str]:
        limit = source_module.BLOCK_CHARACTERS
        text = ""
        for more in self._decoded():
            text += more
            while len(text) > limit:
                stop = cut_position(text[:limit])
                yield text[:stop]
                text = text[stop:]
        if text:
            yield text


class JsonLines(Source):
    """Files with one JSON object a line, whose field `text_field` is a document.

    Uncompressed local files are cut into shards of bytes: a line belongs to the shard that it begins in.
    """

    def __init__(self, name: str, files: Sequence[str], text_field: str, bad_records: str):
        self.name = name
        self._text_field = text_field
        self._bad_records = bad_records
        listing = [(file, *size_and_time(file)) for file in files]
        self.fingerprint = hash_of("jsonl", text_field, bad_records, listing)
        step = source_module.SHARD_BYTES
        self.shards = [
            shard
            for file, size, _ in listing
            for shard in (
                [Shard((file,), size)]
                if is_compressed(file)
                else [
                    Shard((file,), min(step, size - start), start, min(start + step, size))
                    for start in range(0, size, step)
                ]
            )
        ]

    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        for number, line in enumerate(_lines(shard), start=1):
            if not line.strip():
                continue
            try:
                document = self._document(line, number)
            except BadRecord as error:
                refuse_or_skip(f"{self.place(shard, number)}: {error}", self._bad_records, on_skip)
                continue
            if not document.is_empty:
                yield document

    def place(self, shard: Shard, number: int) -> str:
        if shard.start:
            with reading(shard.files[0]) as stream:
                number += _count_lines(stream, shard.start)
        return f"{shard.files[0]}, line {number}"

    def _document(self, line: bytes, number: int) -> Text:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise BadRecord(f"a JSON {type(record).__name__} where an object is expected")
        if self._text_field not in record:
            fields = ", ".join(map(str, record)) or "none"
            raise BadRecord(f"no field {self._text_field!r} (data.text_field); its fields are: {fields}")
        return text_of(record[self._text_field], f"field {self._text_field!r}", number)


def _group_files(files: Iterable[tuple[str, int]]) -> list[Shard]:
    """Groups (file, size) in order into shards of at most SHARD_BYTES, or of one longer file."""
    shards: list[Shard] = []
    group: list[str] = []
    total = 0
    for file, size in files:
        if group and total + size > source_module.SHARD_BYTES:
            shards.append(Shard(tuple(group), total))
            group, total = [], 0
        group.append(file)
        total += size
    return [*shards, Shard(tuple(group), total)]


def _lines(shard: Shard) -> Iterator[bytes]:
    """The lines of a shard, the first of a file without a byte order mark."""
    with reading(shard.files[0]) as stream:
        lines = _lines_between(stream, shard.start, shard.stop) if shard.stop else stream
        for number, line in enumerate(lines):
            yield line if number or shard.start else line.removeprefix(codecs.BOM_UTF8)


def _lines_between(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    position = start
    if start:
        # The line that holds the byte before `start` began in an earlier shard, even if it ends just there.
        stream.seek(start - 1)
        position += len(stream.readline()) - 1
    while position < stop and (line := stream.readline()):
        yield line
        position += len(line)


def _count_lines(stream: BinaryIO, stop: int) -> int:
    """Lines that begin before byte `stop`."""
    count = 0
    position = 0
    while position < stop and (line := stream.readline()):
        position += len(line)
        count += 1
    return count
