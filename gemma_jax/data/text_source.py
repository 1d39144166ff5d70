"""Reads corpora of text files and of JSON lines, local or in a bucket, compressed or not."""

import codecs
import io
import json
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gemma_jax.data import source as source_module
from gemma_jax.data.files import KINDS, is_compressed, reading, unreadable
from gemma_jax.data.source import BadRecord, LongText, Records, Shard, Text, grouped
from gemma_jax.errors import UserError

LONG_FILE_BYTES = 16 * 2**20
"""Text files with more bytes than this are read in blocks, never as a whole."""

_READ_CHARACTERS = 2**20
_OPENING, _COMMA = re.compile(r"\s*\[\s*(\])?"), re.compile(r"\s*(?:,\s*|(\]))")  # group 1 ends an array


class TextFiles(Records):
    """Files of UTF-8 text, one document each. The text is kept unchanged, line endings included."""

    def _cut(self, files: Sequence[tuple[str, int]]) -> list[Shard]:
        groups = [files[group] for group in grouped([size for _, size in files])]
        return [Shard(tuple(file for file, _ in group), sum(size for _, size in group)) for group in groups]

    def _records(self, shard: Shard) -> Iterator[tuple[int, str]]:
        return enumerate(shard.files)

    def _fields(self, record: str) -> dict[str, Any]:
        with reading(record) as stream:
            return {self.text_field: stream.read()}

    def _document(self, record: str, number: int) -> Text | LongText:
        with reading(record) as stream:
            content = stream.read(LONG_FILE_BYTES)
            is_long = bool(stream.read(1))
        try:
            return LongText(record, number) if is_long else Text(content.decode("utf-8"), number)
        except UnicodeDecodeError as error:
            where = "" if is_long else f" at byte {error.start}"
            raise BadRecord(f"not UTF-8 text ({error.reason}{where}; {KINDS} are read)") from error

    def place(self, shard: Shard, number: int) -> str:
        return shard.files[number]


class PythonStdlib(TextFiles):
    """The Python sources of this installation's standard library: with its tests, without installed packages.

    Files are decoded by Python's own rules (PEP 263). The few files for which this fails are the standard
    library's tests of bad encodings; they are not part of the corpus.
    """

    def __init__(self, name: str):
        root = Path(sysconfig.get_path("stdlib"))
        installed = {"site-packages", "dist-packages"}
        found = sorted(root.rglob("*.py"))
        files = [str(path) for path in found if not installed & {*path.relative_to(root).parts}]
        if not files:
            raise UserError(f"{name}: this Python has no source files under {root}; name another corpus.")
        super().__init__(name, files, "", "error", sys.version)

    def _fields(self, record: str) -> dict[str, Any]:
        return {self.text_field: self._document(record, 0).text}

    def _document(self, record: str, number: int) -> Text:
        try:
            with tokenize.open(record) as stream:
                return Text(stream.read(), number)
        except (SyntaxError, UnicodeDecodeError):
            return Text("", number)
        except OSError as error:
            raise unreadable(record, error) from error


class JsonLines(Records):
    """Files with one JSON object per line, or .json files with an array of objects.

    Uncompressed files of lines are cut into shards by byte offset: a line belongs to the shard in which it
    begins. An array is one shard.
    """

    def _cut(self, files: Sequence[tuple[str, int]]) -> list[Shard]:
        shards: list[Shard] = []
        step = source_module.SHARD_BYTES
        for file, size in files:
            if is_compressed(file) or _is_array(file):
                shards.append(Shard((file,), size))
            else:
                starts = range(0, size, step)
                shards += [Shard((file,), min(step, size - at), at, min(at + step, size)) for at in starts]
        return shards

    def _records(self, shard: Shard) -> Iterator[tuple[int, Any]]:
        """Yields the lines that are not blank, or the elements of an array.

        A byte order mark at the start of the file is removed.
        """
        with reading(shard.files[0]) as stream:
            if not shard.stop and _is_array(shard.files[0]):
                yield from enumerate(_elements(stream, shard.files[0]), start=1)
                return
            lines = _lines_between(stream, shard.start, shard.stop) if shard.stop else stream
            for number, line in enumerate(lines, start=1):
                if number == 1 and not shard.start:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line

    def place(self, shard: Shard, number: int) -> str:
        if shard.start:
            with reading(shard.files[0]) as stream:
                number += sum(1 for _ in _lines_between(stream, 0, shard.start))
        is_array = not shard.stop and _is_array(shard.files[0])
        return f"{shard.files[0]}, {'element' if is_array else 'line'} {number}"

    def _fields(self, record: Any) -> dict[str, Any]:
        try:
            fields = json.loads(record.decode("utf-8")) if isinstance(record, bytes) else record
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not valid JSON ({error})") from error
        if not isinstance(fields, dict):
            raise BadRecord(f"a JSON {type(fields).__name__} where an object is expected")
        return fields


def _is_array(file: str) -> bool:
    """Whether a .json file, which may be compressed, is an array and not lines. Reads its beginning."""
    if not re.search(r"(?i)\.json(\.\w+)?$", file):
        return False
    with reading(file) as stream:
        return stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _elements(stream: BinaryIO, file: str) -> Iterator[Any]:
    """Yields the elements of a JSON array, a part of which is in memory at a time.

    Bytes that are not UTF-8 become lone surrogates. Raises UserError if the array is not valid JSON, because
    what follows a mistake cannot be read.
    """
    decoder, more_text = json.JSONDecoder(), io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape")
    text, at, lead = "", 0, _OPENING
    while True:
        try:
            if (found := lead.match(text, at)) is None:
                raise ValueError(f"no bracket or comma before {text[at : at + 20]!r}")
            if found[1]:
                return
            element, at = decoder.raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            # The element may be longer than what was read so far.
            if not (more := more_text.read(max(_READ_CHARACTERS, len(text)))):
                raise UserError(f"{file} is not a whole JSON array ({error}); correct it.") from error
            text, at = text[at:] + more, 0
            continue
        lead = _COMMA
        yield element


def _lines_between(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    position = start
    if start:
        # The line that holds the byte before `start` began in an earlier shard, even if that byte ends it.
        stream.seek(start - 1)
        position += len(stream.readline()) - 1
    while position < stop and (line := stream.readline()):
        yield line
        position += len(line)
