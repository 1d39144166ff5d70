"""What a corpus is to the rest of the package: shards of documents, read one document at a time."""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_jax.errors import UserError

SHARD_BYTES = 32 * 2**20
"""Text in a shard, at most, where the format allows a cut: what a killed tokenisation loses."""

BLOCK_CHARACTERS = 100_000
"""Longest text that is tokenised in one piece. It bounds memory and keeps all cores busy."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a corpus: whole `files`, or the bytes or records `start` to `stop` of one file.

    `size` is about how many bytes reading it takes, for progress; a start and stop of 0 mean the whole file.
    """

    files: tuple[str, ...]
    size: int
    start: int = 0
    stop: int = 0


class Text:
    """A document of text, or a part of one.

    `digest` is a blake2b hash of its UTF-8, `num_bytes` its length in UTF-8, and `number` says which file,
    line or record of its shard it comes from (see `Source.place`).
    """

    def __init__(self, text: str, number: int = 0):
        """Raises UnicodeEncodeError when the text holds lone surrogates, which UTF-8 cannot express."""
        encoded = text.encode("utf-8")
        self.text = text
        self.number = number
        self.num_bytes = len(encoded)
        self.digest = hashlib.blake2b(encoded, digest_size=8).digest()
        self.is_empty = not text

    def blocks(self) -> Iterator[str]:
        """Yields the text in pieces of at most BLOCK_CHARACTERS that tokenise to the ids of the whole."""
        start = 0
        while len(self.text) - start > BLOCK_CHARACTERS:
            stop = start + cut_position(self.text[start : start + BLOCK_CHARACTERS])
            yield self.text[start:stop]
            start = stop
        if start < len(self.text):
            yield self.text[start:]


class TokenIds:
    """A document that is token ids already: int64 [tokens]. How many bytes its text has is not known."""

    num_bytes = 0

    def __init__(self, ids: NDArray[np.int64], number: int = 0):
        self.ids = ids
        self.number = number
        self.is_empty = not len(ids)
        self.digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest()


class LongText(abc.ABC):
    """A document too long to hold in memory at once, with the digest and size of the equal `Text`."""

    digest: bytes
    num_bytes: int
    number: int
    is_empty = False

    @abc.abstractmethod
    def blocks(self) -> Iterator[str]:
        """Yields the text in pieces as `Text.blocks` does."""


Document = Text | LongText | TokenIds
OnSkip = Callable[[str], None]
"""Called with the reason for every record that is skipped and counted."""


class Source(abc.ABC):
    """A corpus. `name` is its spec as the user wrote it.

    `fingerprint` changes whenever the documents may have changed: it covers the names, sizes and times of
    the files and the settings that choose their text.
    """

    name: str
    fingerprint: str
    shards: Sequence[Shard]

    @abc.abstractmethod
    def read(self, shard: Shard, on_skip: OnSkip) -> Iterator[Document]:
        """Yields the shard's documents in a fixed order; documents without any text are left out.

        Raises UserError for a record that cannot be read, or calls `on_skip` where that is the policy.
        """

    @abc.abstractmethod
    def place(self, shard: Shard, number: int) -> str:
        """Names the file, line or record that is number `number` of a shard, as a person would."""


class BadRecord(Exception):
    """What is wrong with a record, without its place."""


def refuse_or_skip(problem: str, bad_records: str, on_skip: OnSkip) -> None:
    """Raises UserError for a bad record, or skips it where data.bad_records is "skip"."""
    if bad_records != "skip":
        raise UserError(
            f"{problem}; correct it, or set data.bad_records=skip to leave such records out and count them."
        )
    on_skip(problem)


def text_of(value: object, field: str, number: int) -> Text:
    """The document in a record's field. Raises BadRecord if it is not text."""
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


def cut_position(text: str) -> int:
    """Where to cut a text so that the parts tokenise as the whole does: behind its last run of newlines.

    Newlines are user-defined pieces in Gemma's model and in ours, so no piece spans such a place. A text of
    one line is cut in front of its last run of spaces (where no piece of Gemma's spans either), and one
    without spaces at its end: no character is lost, but the tokens there may differ.
    """
    behind_newlines = text.rstrip("\n").rfind("\n") + 1
    return behind_newlines or len(text[: text.rfind(" ") + 1].rstrip(" ")) or len(text)


def is_held_out(document: Document, held_out: float) -> bool:
    """Whether a document belongs to the held-out split: its hash decides, so equal documents go together."""
    return int.from_bytes(document.digest, "little") < held_out * 2**64


def hash_of(*parts: object) -> str:
    """A hex SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
