"""One shard of a token cache: its files, and whether they are whole.

A cache is kept under CACHE_DIR/tokens/KEY, where KEY is a hash of everything that decides its contents. For
each shard NNNNN of the corpus and each split, `NNNNN.SPLIT.ids` holds the token ids of its examples one after
the other (little-endian uint16, or uint32 for vocabularies over 65,536), those of a document followed by eos,
and `NNNNN.SPLIT.lengths.npy` their lengths (int64). Of a source with loss weights, `NNNNN.SPLIT.weights`
holds the weight of each id, one byte, in hundredths. `NNNNN.json`, written last, holds the sizes, a digest of
each file's examples, a CRC-32 of each file, and a digest of this metadata: a shard without it, or whose files
have other sizes, is written again. The CRCs are compared when rows are made of it. All writers write the same
bytes, so that any number of processes may fill one cache at once.

The ids are flat files rather than records because packing wants any piece of any document as one slice.
"""

import dataclasses
import json
import zlib
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import NDArray

from gemma_jax.data.source import SPLITS, Split, hash_of
from gemma_jax.data.storage import ArrayFile, cache_error

_CHECKED_TOKENS = 2**24  # at a time


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """How much a split holds. `tokens` counts one eos a document; `num_bytes` is its text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: "SplitSize") -> "SplitSize":
        return SplitSize(
            self.documents + other.documents, self.tokens + other.tokens, self.num_bytes + other.num_bytes
        )


@dataclasses.dataclass(frozen=True)
class CachedShard:
    """One shard of a cache, checked to be whole."""

    directory: epath.Path
    number: int
    dtype: np.dtype[Any]
    sizes: dict[Split, SplitSize] = dataclasses.field(default_factory=dict, hash=False)
    skipped: int = 0
    digests: tuple[str, ...] = dataclasses.field(default=(), hash=False)
    """Of the documents of each of its files, in order."""
    weighted: bool = False
    checksums: dict[Split, list[int]] = dataclasses.field(default_factory=dict, hash=False)
    """CRC-32 of the ids, the weights and the lengths of each split."""

    def path(self, split: Split, ending: str) -> epath.Path:
        return self.directory / f"{self.number:05d}.{split}.{ending}"

    def tokens(self, split: Split) -> ArrayFile:
        """The ids of all documents one after the other, each followed by eos."""
        return ArrayFile(self.path(split, "ids"), self.dtype)

    def weights(self, split: Split) -> ArrayFile | None:
        """For each id its weight in the loss, in hundredths, where the corpus has weights."""
        return ArrayFile(self.path(split, "weights"), np.dtype("u1")) if self.weighted else None

    def lengths(self, split: Split) -> NDArray[np.int64]:
        """int64 [documents]: tokens of each document, eos included."""
        file = ArrayFile(self.path(split, "lengths.npy"))
        return file.read(0, len(file))

    def is_as_written(self, split: Split) -> bool:
        """Whether the files of a split hold what was written. Reads all of them."""
        size = self.sizes[split].tokens
        checksums = [0, 0, zlib.crc32(self.lengths(split).tobytes())]
        for i, file in enumerate((self.tokens(split), self.weights(split))):
            for start in range(0, 0 if file is None else size, _CHECKED_TOKENS):
                assert file is not None
                part = file.read(start, min(start + _CHECKED_TOKENS, size))
                checksums[i] = zlib.crc32(part.tobytes(), checksums[i])
        return checksums == self.checksums[split]


def open_shard(directory: epath.Path, number: int, dtype: np.dtype[Any]) -> CachedShard | None:
    """A shard whose files have the sizes in its metadata, or None."""
    try:
        metadata = json.loads((directory / f"{number:05d}.json").read_text())
        if metadata.pop("digest") != hash_of(metadata):
            return None
        sizes = {split: SplitSize(**metadata[split]) for split in SPLITS}
        of_shard = int(metadata["skipped"]), tuple(metadata["digests"]), bool(metadata["weighted"])
        shard = CachedShard(directory, number, dtype, sizes, *of_shard, metadata["checksums"])
        for split, size in sizes.items():
            if shard.path(split, "ids").stat().length != size.tokens * dtype.itemsize:
                return None
            if shard.weighted and shard.path(split, "weights").stat().length != size.tokens:
                return None
            if shard.lengths(split).shape != (size.documents,):
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    except OSError as error:
        raise cache_error(directory, error) from error
    return shard
