"""One shard of a token cache: its files, and the checks that they are complete and intact.

A cache is kept under CACHE_DIR/tokens/KEY, where KEY is a hash of everything that decides its contents. Each
shard NNNNN of the corpus has these files for each split:

- `NNNNN.SPLIT.ids`: the token ids of its examples, concatenated (little-endian uint16, or uint32 for
  vocabularies over 65,536). The ids of a document are followed by eos.
- `NNNNN.SPLIT.lengths.npy`: the lengths of the examples in tokens (int64).
- `NNNNN.SPLIT.weights`, if the source has loss weights: the weight of each id, one byte, in hundredths.
- `NNNNN.SPLIT.trained.npy`, likewise: the number of ids of each example with a weight above 0 (int64).

`NNNNN.json` is written last. It holds the sizes, a digest of each corpus file's examples, a CRC-32 of each
cache file, and a digest of this metadata. A shard that has no such file, or files of other sizes, is written
again. The CRCs are compared when rows are built from the shard. All writers write the same bytes, so any
number of processes may fill one cache at once.

The ids are flat files rather than records because packing needs any piece of any document as one slice.
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

_CHECKED_TOKENS = 2**24  # tokens read at once when a shard's CRCs are compared


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """How much a split holds. `tokens` includes one eos per document; `num_bytes` is its text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: "SplitSize") -> "SplitSize":
        return SplitSize(
            self.documents + other.documents, self.tokens + other.tokens, self.num_bytes + other.num_bytes
        )


@dataclasses.dataclass(frozen=True)
class CachedShard:
    """One shard of a cache. `open_shard` returns one only if its files are complete."""

    directory: epath.Path
    number: int
    dtype: np.dtype[Any]
    sizes: dict[Split, SplitSize] = dataclasses.field(default_factory=dict, hash=False)
    skipped: int = 0
    """The number of records that could not be read."""
    dropped: int = 0
    """The number of records that are left out because they are longer than a row."""
    shortened: int = 0
    """The number of examples that were cut because they are longer than a row."""
    digests: tuple[str, ...] = dataclasses.field(default=(), hash=False)
    """For each corpus file in the shard, in order, a digest of its documents."""
    weighted: bool = False
    checksums: dict[Split, list[int]] = dataclasses.field(default_factory=dict, hash=False)
    """For each split, the CRC-32 of its ids, of its weights, of its lengths and, if any, of `trained`."""

    def path(self, split: Split, ending: str) -> epath.Path:
        return self.directory / f"{self.number:05d}.{split}.{ending}"

    def tokens(self, split: Split) -> ArrayFile:
        """The token ids of all examples, concatenated; those of a document are followed by eos."""
        return ArrayFile(self.path(split, "ids"), self.dtype)

    def weights(self, split: Split) -> ArrayFile | None:
        """The loss weight of each id, in hundredths; None if the corpus has no weights."""
        return ArrayFile(self.path(split, "weights"), np.dtype("u1")) if self.weighted else None

    def lengths(self, split: Split) -> NDArray[np.int64]:
        """int64 [documents]: the number of tokens of each document, eos included."""
        return self._counts(split, "lengths.npy")

    def trained(self, split: Split) -> NDArray[np.int64]:
        """int64 [examples]: the number of tokens of each example that have a weight above 0."""
        return self._counts(split, "trained.npy") if self.weighted else self.lengths(split)

    def _counts(self, split: Split, ending: str) -> NDArray[np.int64]:
        file = ArrayFile(self.path(split, ending))
        return file.read(0, len(file))

    def is_as_written(self, split: Split) -> bool:
        """Whether the CRCs of a split's files match those recorded at writing. Reads the files."""
        size = self.sizes[split].tokens
        counts = [self.lengths(split), self.trained(split)][: 1 + self.weighted]
        checksums = [0, 0, *(zlib.crc32(each.tobytes()) for each in counts)]
        for i, file in enumerate((self.tokens(split), self.weights(split))):
            for start in range(0, 0 if file is None else size, _CHECKED_TOKENS):
                assert file is not None
                part = file.read(start, min(start + _CHECKED_TOKENS, size))
                checksums[i] = zlib.crc32(part.tobytes(), checksums[i])
        return checksums == self.checksums[split]


def open_shard(directory: epath.Path, number: int, dtype: np.dtype[Any]) -> CachedShard | None:
    """Returns the shard, or None if it is missing or its files do not have the sizes in its metadata.

    Raises:
      UserError: The files cannot be read.
    """
    try:
        metadata = json.loads((directory / f"{number:05d}.json").read_text())
        if metadata.pop("digest") != hash_of(metadata):
            return None
        sizes = {split: SplitSize(**metadata[split]) for split in SPLITS}
        skipped, dropped, shortened = (int(metadata[kind]) for kind in ("skipped", "dropped", "shortened"))
        of_shard = tuple(metadata["digests"]), bool(metadata["weighted"]), metadata["checksums"]
        shard = CachedShard(directory, number, dtype, sizes, skipped, dropped, shortened, *of_shard)
        for split, size in sizes.items():
            if shard.path(split, "ids").stat().length != size.tokens * dtype.itemsize:
                return None
            if shard.weighted and shard.path(split, "weights").stat().length != size.tokens:
                return None
            if not shard.lengths(split).shape == shard.trained(split).shape == (size.documents,):
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    except OSError as error:
        raise cache_error(directory, error) from error
    return shard
