"""Reads corpora of text files and of JSON lines, local or in a bucket, compressed or not."""

import codecs
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gemma_jax.data import source as source_module
from gemma_jax.data.files import KINDS, is_compressed, reading, unreadable
from gemma_jax.data.source import BadRecord, Document, LongText, Records, Shard, Text, grouped, text_of
from gemma_jax.errors import UserError

LONG_FILE_BYTES = 16 * 2**20
"""Text files with more bytes than this are read in blocks, never as a whole."""


class TextFiles(Records):
    """Files of UTF-8 text, one document each. The text is kept unchanged, line endings included."""

    def _cut(self, files: Sequence[tuple[str, int]]) -> list[Shard]:
        groups = [files[group] for group in grouped([size for _, size in files])]
        return [Shard(tuple(file for file, _ in group), sum(size for _, size in group)) for group in groups]

    def _records(self, shard: Shard) -> Iterator[tuple[int, str]]:
        return enumerate(shard.files)

    def _document(self, record: str, shard: Shard, number: int) -> Text | LongText:
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

    def _document(self, record: str, shard: Shard, number: int) -> Text:
        try:
            with tokenize.open(record) as stream:
                return Text(stream.read(), number)
        except (SyntaxError, UnicodeDecodeError):
            return Text("", number)
        except OSError as error:
            raise unreadable(record, error) from error


class JsonLines(Records):
    """Files with one JSON object per line. Its field `text_field` is a document.

    Uncompressed files are cut into shards by byte offset: a line belongs to the shard in which it begins.
    """

    def _cut(self, files: Sequence[tuple[str, int]]) -> list[Shard]:
        shards: list[Shard] = []
        step = source_module.SHARD_BYTES
        for file, size in files:
            if is_compressed(file):
                shards.append(Shard((file,), size))
            else:
                starts = range(0, size, step)
                shards += [Shard((file,), min(step, size - at), at, min(at + step, size)) for at in starts]
        return shards

    def _records(self, shard: Shard) -> Iterator[tuple[int, bytes]]:
        """Yields the lines that are not blank. A byte order mark at the start of the file is removed."""
        with reading(shard.files[0]) as stream:
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
        return f"{shard.files[0]}, line {number}"

    def _document(self, record: bytes, shard: Shard, number: int) -> Document:
        try:
            fields = json.loads(record.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not valid JSON ({error})") from error
        if not isinstance(fields, dict):
            raise BadRecord(f"a JSON {type(fields).__name__} where a line with an object is expected")
        return self.document_of(fields, number)

    def document_of(self, fields: dict[str, Any], number: int) -> Document:
        """Returns the document in a JSON object. Raises BadRecord if there is none."""
        if self._text_field not in fields:
            names = ", ".join(fields) or "none"
            raise BadRecord(f"no field {self._text_field!r} (data.text_field); its fields are: {names}")
        return text_of(fields[self._text_field], f"field {self._text_field!r}", number)


def _lines_between(stream: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    position = start
    if start:
        # The line that holds the byte before `start` began in an earlier shard, even if that byte ends it.
        stream.seek(start - 1)
        position += len(stream.readline()) - 1
    while position < stop and (line := stream.readline()):
        yield line
        position += len(line)
