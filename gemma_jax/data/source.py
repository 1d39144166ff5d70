"""Defines the interface of a corpus to the rest of the package: shards of examples, read one at a time.

An example is a sequence of token ids, each with its weight in the loss. A document is the plain case: text or
token ids without weights. The cache adds eos to it, and all its tokens have weight 1.
"""

import abc
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemma_jax.data.files import reading, size_and_time
from gemma_jax.errors import UserError

SHARD_BYTES = 32 * 2**20
"""The most bytes in a shard, if the format allows a cut. A killed tokenisation loses unfinished shards."""

BLOCK_CHARACTERS = 100_000
"""The longest text that is tokenised in one piece. It bounds memory and keeps all cores busy."""


_READ_CHARACTERS = 2**20


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a corpus: whole `files`, or the bytes, records or row groups `start` to `stop` of one file.

    `size` is the approximate number of bytes to read, for progress. If `start` and `stop` are 0, the shard is
    the whole file.
    """

    files: tuple[str, ...]
    size: int
    start: int = 0
    stop: int = 0


class Text:
    """A document of text, or a part of one.

    `digest` is a blake2b hash of its UTF-8 encoding, and `num_bytes` is the length of that. `number`
    identifies the file, line or record of the shard that it comes from (see `Source.place`).
    """

    def __init__(self, text: str, number: int = 0):
        """Raises UnicodeEncodeError if the text holds lone surrogates, which UTF-8 cannot express."""
        encoded = text.encode("utf-8")
        self.text = text
        self.number = number
        self.num_bytes = len(encoded)
        self.digest = hashlib.blake2b(encoded, digest_size=8).digest()
        self.is_empty = not text

    def blocks(self) -> Iterator[str]:
        """Yields the text in pieces of at most BLOCK_CHARACTERS, cut where tokenising is not affected."""
        step = BLOCK_CHARACTERS
        return _blocks(self.text[start : start + step] for start in range(0, len(self.text), step))


class LongText:
    """A file of text that is too long to hold in memory, with the digest and size that a `Text` of it has.

    The file is read once to check and hash it, and again for its blocks.
    """

    is_empty = False

    def __init__(self, file: str, number: int):
        """Raises UnicodeDecodeError if the file is not UTF-8."""
        self._file = file
        self.number = number
        self.num_bytes = 0
        digest = hashlib.blake2b(digest_size=8)
        for text in self._decoded():
            encoded = text.encode("utf-8")
            digest.update(encoded)
            self.num_bytes += len(encoded)
        self.digest = digest.digest()

    def blocks(self) -> Iterator[str]:
        """Yields the text in pieces, as `Text.blocks` does."""
        return _blocks(self._decoded())

    def _decoded(self) -> Iterator[str]:
        with reading(self._file) as stream, io.TextIOWrapper(stream, "utf-8", newline="") as decoded:
            while text := decoded.read(_READ_CHARACTERS):
                yield text


class TokenIds:
    """A document that is already token ids, int64 [tokens]. The number of bytes of its text is unknown."""

    num_bytes = 0

    def __init__(self, ids: NDArray[np.int64], number: int = 0):
        self.ids = ids
        self.number = number
        self.is_empty = not len(ids)
        self.digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest()


class Example:
    """Token ids that are stored unchanged, and the weight of each as a target in the loss.

    The model's inputs are bos and all but the last of `ids`; its targets are `ids`. So `ids` must not include
    a leading bos, and must end with the token that ends the answer. A prompt is masked by weights of 0.
    """

    num_bytes = 0
    is_empty = False
    shortened = False
    """Whether this is what was left of an example that is longer than a row."""

    def __init__(self, ids: Sequence[int], weights: Sequence[float], number: int = 0, split_by: bytes = b""):
        """Creates an example from ids and weights, [tokens] each.

        Args:
          ids: The token ids.
          weights: The loss weights: multiples of 0.01 from 0 to 2.55.
          number: The file, line or record, as in `Text`.
          split_by: The bytes, such as the prompt, whose hash decides whether the example is held out. If
            empty, the ids decide.

        Raises:
          BadRecord: No weight is above 0, a weight is not such a multiple, or there is not one for each id.
        """
        self.ids = np.asarray(ids, np.int64)
        hundredths = np.asarray(weights, np.float64) * 100
        self.weights = np.clip(np.nan_to_num(hundredths).round(), 0, 255).astype(np.uint8)
        """The weights in hundredths, uint8."""
        self.number = number
        if self.ids.shape != self.weights.shape or not np.allclose(self.weights, hundredths, 0, 1e-6):
            raise BadRecord("each token needs a loss weight of whole hundredths from 0 to 2.55")
        if not self.weights.any():
            raise BadRecord("no token has a loss weight above 0, so there is nothing to learn")
        content = self.ids.astype("<i8").tobytes()
        self.digest = hashlib.blake2b(split_by or content, digest_size=8).digest()
        self.content_digest = hashlib.blake2b(content + self.weights.tobytes(), digest_size=8).digest()


Document = Text | LongText | TokenIds | Example
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, Split] = ("train", "held_out")


class BadRecord(Exception):
    """Raised for a record that cannot be used. The message says why, but not where the record is."""


class LongExample(BadRecord):
    """Raised for an example that is left out because it does not fit into a row, as the config asks."""


OnSkip = Callable[[BadRecord], None]
"""A function that is called for every skipped record, with the place and the reason."""


class Source(abc.ABC):
    """A corpus. `name` is its spec as the user wrote it.

    `fingerprint` changes whenever the documents may have changed: it covers the names, sizes and modification
    times of the files and the settings that select their text.

    A `weighted` source yields only `Example`s, which are never cut into several segments: one that is longer
    than a row is refused. Any other source yields none. Each `group_size` consecutive examples belong
    together, such as the two answers of a preference: they are in the same split and are neighbours in one
    row.
    """

    name: str
    fingerprint: str
    shards: Sequence[Shard]
    weighted: bool = False
    group_size: int = 1

    @abc.abstractmethod
    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        """Yields the shard's documents in a fixed order; empty documents are left out.

        For a record that cannot be read, raises UserError or, if such records are skipped, calls `on_skip`.
        """

    @abc.abstractmethod
    def place(self, shard: Shard, number: int) -> str:
        """Describes, for a message, the file, line or record that has number `number` in a shard."""


class Records(Source):
    """A corpus of files that hold records. The field `text_field` of each record is a document.

    A subclass reads the fields of its format; `convert` makes of them whatever the caller wants.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        text_field: str,
        bad_records: str,
        *settings: str,
        all_fields: bool = False,
    ):
        """Opens the corpus. All arguments except `name` decide the documents and are in the fingerprint.

        With `all_fields`, records are read whole, and may be without `text_field`.
        """
        self.name = name
        self.text_field = text_field
        self._bad_records = bad_records
        self._all_fields = all_fields
        listing = [(file, *size_and_time(file)) for file in files]
        self.fingerprint = hash_of(type(self).__name__, text_field, bad_records, settings, listing)
        self.shards = self._cut([(file, size) for file, size, _ in listing])

    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        return self._each(shard, on_skip, lambda record, number: [self._document(record, number)])

    def convert(
        self, shard: Shard, on_skip: OnSkip, use: Callable[[dict[str, Any], int], Sequence[Document]]
    ) -> Iterator[Document]:
        """Yields what `use` makes of the fields and the number of each record of a shard.

        Values from JSON and Parquet are Python's own; texts may be bytes of UTF-8. `use` raises BadRecord or
        LongExample for a record that it cannot use. The errors of reading are those of `read`.
        """
        return self._each(shard, on_skip, lambda record, number: use(self._fields(record), number))

    def _each(
        self, shard: Shard, on_skip: OnSkip, use: Callable[[Any, int], Sequence[Document]]
    ) -> Iterator[Document]:
        for number, record in self._records(shard):
            try:
                documents = use(record, number)
            except BadRecord as error:
                problem = f"{self.place(shard, number)}: {error}"
                if self._bad_records != "skip" and not isinstance(error, LongExample):
                    raise UserError(
                        f"{problem}; correct it, or set data.bad_records=skip to leave such records out and "
                        "count them."
                    ) from error
                on_skip(type(error)(problem))
                continue
            yield from (document for document in documents if not document.is_empty)

    @abc.abstractmethod
    def _cut(self, files: Sequence[tuple[str, int]]) -> list[Shard]:
        """Divides files, given as pairs of name and size in bytes, into shards."""

    @abc.abstractmethod
    def _records(self, shard: Shard) -> Iterator[tuple[int, Any]]:
        """Yields the number and content of each record of a shard, as stored in the file."""

    @abc.abstractmethod
    def _fields(self, record: Any) -> dict[str, Any]:
        """Returns the fields of a record by name. Raises BadRecord if it cannot be read."""

    def _document(self, record: Any, number: int) -> Document:
        """Returns the document in a record. Raises BadRecord if there is none."""
        fields = self._fields(record)
        if self.text_field not in fields:
            names = ", ".join(fields) or "none"
            raise BadRecord(f"no field {self.text_field!r} (data.text_field); its fields are: {names}")
        return text_of(fields[self.text_field], f"field {self.text_field!r}", number)


def text_of(value: object, field: str, number: int) -> Text:
    """Returns the document in a record's field. Raises BadRecord if the value is not text."""
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        if isinstance(value, str):
            return Text(value, number)
    except UnicodeDecodeError as error:
        raise BadRecord(f"{field} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise BadRecord(f"{field} holds a lone surrogate") from error
    raise BadRecord(f"{field} is not a string but {type(value).__name__}")


def grouped(sizes: Sequence[int]) -> list[slice]:
    """Groups consecutive parts of a corpus, given their sizes, so that a group has at most SHARD_BYTES.

    A part that is larger than that is a group of its own.
    """
    groups: list[slice] = []
    total = 0
    for number, size in enumerate(sizes):
        total += size
        if groups and total <= SHARD_BYTES:
            groups[-1] = slice(groups[-1].start, number + 1)
        else:
            groups.append(slice(number, number + 1))
            total = size
    return groups


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        rest += piece
        while len(rest) > BLOCK_CHARACTERS:
            stop = _cut_position(rest[:BLOCK_CHARACTERS])
            yield rest[:stop]
            rest = rest[stop:]
    if rest:
        yield rest


def _cut_position(text: str) -> int:
    """Returns the index at which to cut a text so that the parts tokenise as the whole does.

    This is after the last run of newlines. Newlines are user-defined pieces in Gemma's tokenizer and in ours,
    so no piece spans such an index. A text of one line is cut before its last run of spaces (which no piece
    of Gemma's spans either), and a text without spaces at its end: no character is lost there, but the tokens
    may differ.
    """
    behind_newlines = text.rstrip("\n").rfind("\n") + 1
    return behind_newlines or len(text[: text.rfind(" ") + 1].rstrip(" ")) or len(text)


def is_held_out(document: Document, held_out: float) -> bool:
    """Whether a document is held out. Its hash decides, so equal documents are in the same split."""
    return int.from_bytes(document.digest, "little") < held_out * 2**64


def split_documents(
    source: Source, shard: Shard, held_out: float, on_skip: OnSkip
) -> Iterator[tuple[Split, Document]]:
    """Yields the documents of a shard, each with its split. A group's first example decides for all of it.

    Raises ValueError if the last group is incomplete.
    """
    split: Split = "train"
    count = 0
    for document in source.read(shard, on_skip):
        if count % source.group_size == 0:
            split = "held_out" if is_held_out(document, held_out) else "train"
        count += 1
        yield split, document
    if count % source.group_size:
        raise ValueError(f"{source.name} has {count} examples in {shard}, in groups of {source.group_size}")


def hash_of(*parts: object) -> str:
    """Returns the SHA-256, in hexadecimal, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
