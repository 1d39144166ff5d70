"""Statistics of a run's corpora, for messages and to detect at a later start that the data has changed."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.data.cached_shard import SplitSize
from gemma_jax.data.rows import PackedRows
from gemma_jax.data.source import hash_of
from gemma_jax.data.token_cache import TokenCache

_MOST_FILES = 1000
_NAMED_FILES = 3


@dataclasses.dataclass(frozen=True)
class SourceStatistics:
    """What one corpus holds. No token of a document is ever dropped: an epoch has train.tokens targets."""

    name: str
    train: SplitSize
    held_out: SplitSize
    """Its documents and bytes are 0 if pieces of documents are held out."""
    train_rows: int
    held_out_rows: int
    utilisation: float
    """The share of the slots of training rows that hold a token."""
    skipped: int
    """The number of records that could not be read and were skipped (data.bad_records=skip)."""
    dropped: int
    """The number of records that were left out because they are longer than a row."""
    shortened: int
    """The number of examples that were cut because they are longer than a row."""
    by_pieces: bool
    """Whether pieces of documents are held out, because there are too few documents."""
    digest: str
    """A digest of the contents, in order. It does not depend on where the files are, or on their times."""
    files: Mapping[str, str]
    """A digest of each file, by its path in their common folder; if there are many, of runs of files."""

    def sentences(self) -> list[str]:
        """Returns the sentences that describe the corpus when a run starts."""
        train, held_out = self.train, self.held_out
        rows = f"{self.train_rows:,} rows ({self.utilisation:.1%} full)"
        held = f"{held_out.documents:,} documents, {held_out.tokens:,} tokens held out"
        if self.by_pieces:
            held = f"there are too few documents, so pieces of them are held out: {held_out.tokens:,} tokens"
        if self.by_pieces and not held_out.tokens:
            held = "too small to hold anything out, so no held-out loss is measured; name a larger corpus"
        lines = [f"{train.documents:,} documents, {train.tokens:,} tokens in {rows}", held]
        if self.skipped:
            lines.append(f"{self.skipped:,} unreadable records skipped")
        if self.dropped:
            lines.append(f"{self.dropped:,} examples longer than data.sequence_length left out")
        if self.shortened:
            lines.append(f"{self.shortened:,} examples longer than data.sequence_length cut")
        return [f"{self.name}: {line}" for line in lines]

    def change_since(self, then: Mapping[str, Any]) -> str:
        """Describes the changes since the statistics `then`, read from JSON; "" if the rows are the same.

        Raises:
          ValueError, KeyError, TypeError: `then` does not hold such statistics.
        """
        now = dataclasses.asdict(self)
        deciding = ("digest", "files", "train", "held_out", "train_rows", "held_out_rows")
        if all(then[name] == now[name] for name in deciding):
            return ""
        before, after = dict(then["files"]), self.files
        kinds = {
            "changed": [name for name in before if name in after and before[name] != after[name]],
            "missing": [name for name in before if name not in after],
            "new": [name for name in after if name not in before],
        }
        found = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
        sizes = f"{then['train']['tokens']:,} tokens to train on before, {self.train.tokens:,} now"
        return "; ".join([*found, sizes])


def source_statistics(train: PackedRows, held_out: PackedRows) -> SourceStatistics:
    cache = train.cache
    return SourceStatistics(
        name=cache.source.name,
        train=train.size,
        held_out=held_out.size,
        train_rows=len(train),
        held_out_rows=len(held_out),
        utilisation=train.utilisation,
        skipped=cache.skipped,
        dropped=cache.dropped,
        shortened=sum(shard.shortened for shard in cache.shards),
        by_pieces=cache.by_pieces,
        digest=hash_of([shard.digests for shard in cache.shards]),
        files=_file_digests(cache),
    )


def _file_digests(cache: TokenCache) -> dict[str, str]:
    digests: dict[str, list[str]] = {}
    for part, shard in zip(cache.source.shards, cache.shards, strict=True):
        for file, digest in zip(part.files, shard.digests, strict=True):
            digests.setdefault(file, []).append(digest)
    files = list(digests)
    folder = os.path.commonprefix(files).rpartition("/")[0]
    step = -(-len(files) // _MOST_FILES)
    found = {}
    for start in range(0, len(files), step):
        some = files[start : start + step]
        name = " to ".join(file.removeprefix(f"{folder}/") for file in dict.fromkeys([some[0], some[-1]]))
        found[name] = hash_of([[file.removeprefix(f"{folder}/"), digests[file]] for file in some])[:16]
    return found


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_FILES
    return ", ".join(names[:_NAMED_FILES]) + (f" and {more:,} more" if more > 0 else "")
