"""Packs documents into rows: decides which pieces of documents make up each row, and fills the rows.

The ids t1..tm of a document and its eos form a body of m + 1 tokens, which is cut into pieces of at most L
tokens. A piece body[a:b] becomes a segment of a row: its inputs are bos and body[a:b-1], its targets are
body[a:b], and its positions are 0..b-a-1. So every token of every document, and its eos, is predicted exactly
once, every segment starts with bos, and only the last piece of a document has eos as its last target. With
L = 8, a document `a b c` and a document `d e` make this row:

    tokens         bos  a    b    c    bos  d    e    pad
    targets        a    b    c    eos  d    e    eos  pad
    loss_weights   1    1    1    1    1    1    1    0
    positions      0    1    2    3    0    1    2    0
    segment_ids    1    1    1    1    2    2    2    0

An example with loss weights is a body without an added eos, and is one piece. A source may require that
groups of examples are neighbours in one row. Rows of examples also have a capacity of trained tokens, those
with a weight above 0, so that the loss need not be computed at every position (`sizes_with_capacity`). The
functions here depend on numpy only and, apart from `fill_row`, are pure; a row index depends on the lengths
and the numbers of trained tokens alone.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE = np.dtype([("offset", "<i8"), ("length", "<i4")])
"""A piece: where it starts in its shard's token stream, and how many tokens it has."""


class Batch(NamedTuple):
    """Rows of packed segments, all arrays [B, L]."""

    tokens: NDArray[np.int32]
    """The inputs of the model; pad in unused slots."""
    targets: NDArray[np.int32]
    """The token to predict at each position; pad in unused slots."""
    loss_weights: NDArray[np.float32]
    """The weight of each target in the loss; 1 in documents, 0 in unused slots."""
    positions: NDArray[np.int32]
    """The position of each token within its segment, from 0; 0 in unused slots."""
    segment_ids: NDArray[np.int32]
    """The segment of each token, numbered from 1 within the row; 0 in unused slots."""


class PairBatch(NamedTuple):
    """Rows of preference pairs, and what the model thought of their answers before training."""

    batch: Batch
    reference: NDArray[np.float32]
    """[B, S]: log-probability of each segment's answer, in nats."""


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """Says which pieces make up each row: those of row i are `pieces[starts[i]:starts[i + 1]]`.

    pieces: PIECE [number of pieces], sorted by row, and within a row by offset.
    starts: int64 [number of rows + 1].
    """

    pieces: NDArray[Any]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> NDArray[Any]:
        """Returns the pieces of a row: PIECE [pieces of the row]."""
        return self.pieces[self.starts[number] : self.starts[number + 1]]


def cut_documents(document_lengths: NDArray[np.int64], sequence_length: int) -> NDArray[Any]:
    """Cuts consecutive documents into pieces. Returns PIECE [number of pieces], in stream order.

    document_lengths: int64 [documents], the tokens of each body, at least 1 because eos counts.
    """
    counts = -(-document_lengths // sequence_length)
    document_starts = np.cumsum(document_lengths) - document_lengths
    first_pieces = np.cumsum(counts) - counts
    # The offset of each piece within its document, in tokens.
    within = (np.arange(counts.sum()) - np.repeat(first_pieces, counts)) * sequence_length
    pieces = np.empty(len(within), PIECE)
    pieces["offset"] = np.repeat(document_starts, counts) + within
    pieces["length"] = np.minimum(np.repeat(document_lengths, counts) - within, sequence_length)
    return pieces


def sizes_with_capacity(
    lengths: NDArray[np.int64], trained: NDArray[np.int64], sequence_length: int, trained_capacity: int
) -> NDArray[np.int64]:
    """Returns sizes for packing into rows of `sequence_length`, int64 [groups].

    Groups whose sizes fit into a row have at most `sequence_length` tokens and `trained_capacity` trained
    ones: a size is the larger of the group's share of each capacity.

    lengths, trained: int64 [groups], the tokens of each group and those of them that are trained.
    """
    return np.maximum(lengths, -(-trained * sequence_length // trained_capacity))


def smallest_trained_capacity(
    shards: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], sequence_length: int, least: int
) -> int:
    """Returns the smallest capacity of trained tokens that needs at most 5% more rows than no limit does.

    shards: The lengths and trained tokens of the groups of each shard, as for `sizes_with_capacity`.
    least: The smallest capacity to consider: the most trained tokens of any group.
    """

    def rows(capacity: int) -> int:
        sizes = (sizes_with_capacity(*shard, sequence_length, capacity) for shard in shards)
        return sum(int(best_fit_decreasing(each, sequence_length).max()) + 1 for each in sizes if len(each))

    most_rows = rows(sequence_length) * 21 // 20
    return least + bisect.bisect_left(
        range(least, sequence_length), True, key=lambda capacity: rows(capacity) <= most_rows
    )


def best_fit_decreasing(lengths: NDArray[np.integer[Any]], capacity: int) -> NDArray[np.int64]:
    """Returns the bin of each piece, int64 [pieces], by best-fit decreasing bin packing (Johnson, 1973).

    From the longest piece to the shortest, each is put into the fullest bin that has room for it. Pieces of
    equal length are interchangeable, and so are bins with equal free space, so each step places as many
    pieces as it can at once. The number of steps therefore grows with the capacity (a few steps for each
    length from 1 to capacity), not with the number of pieces.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    # free[space] holds arrays of bins that have this much space left. Bit `space` of `spaces` is set if there
    # are any such bins.
    free: dict[int, list[NDArray[np.int64]]] = {}
    spaces = 0
    opened = 0
    values, counts = np.unique(-lengths, return_counts=True)
    done = 0
    for length, count in zip((-values).tolist(), counts.tolist(), strict=True):
        while count:
            roomy = spaces >> length << length
            if roomy:
                space = (roomy & -roomy).bit_length() - 1
                candidates = np.concatenate(free.pop(space))
                spaces &= ~(1 << space)
            else:
                space = capacity
                candidates = np.arange(opened, opened + -(-count // (capacity // length)), dtype=np.int64)
                opened += len(candidates)
            each = space // length
            used = min(len(candidates), -(-count // each))
            placed = min(count, used * each)
            bins[order[done : done + placed]] = np.repeat(candidates[:used], each)[:placed]
            done += placed
            count -= placed
            last = placed - (used - 1) * each
            for left, group in (
                (space - each * length, candidates[: used - 1]),
                (space - last * length, candidates[used - 1 : used]),
                (space, candidates[used:]),
            ):
                if left and len(group):
                    free.setdefault(left, []).append(group)
                    spaces |= 1 << left
    return bins


def build_row_index(pieces: NDArray[Any], sizes: NDArray[np.integer[Any]], capacity: int) -> RowIndex:
    """Packs a shard's pieces (PIECE, in stream order) into rows. The result is deterministic.

    Each group of consecutive pieces, whose size is one of `sizes` [groups], stays together in one row. The
    sizes in a row add up to at most `capacity`. All groups have the same number of pieces. Rows are ordered
    by their first piece, so that neighbouring rows come from neighbouring documents.
    """
    bins = best_fit_decreasing(sizes, capacity)
    group_size = len(pieces) // max(len(sizes), 1)
    _, first_groups, bins = np.unique(bins, return_index=True, return_inverse=True)
    rank = np.empty(len(first_groups), np.int64)
    rank[np.argsort(first_groups)] = np.arange(len(first_groups))
    rows = np.repeat(rank[bins], group_size)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(first_groups)))])
    return RowIndex(pieces[np.argsort(rows, kind="stable")], starts.astype(np.int64))


def empty_rows(number: int, sequence_length: int, pad_id: int) -> Batch:
    """Returns a batch of `number` rows without any segment; its arrays are [number, L]."""
    shape = (number, sequence_length)
    return Batch(
        np.full(shape, pad_id, np.int32),
        np.full(shape, pad_id, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
    )


def fill_row(
    batch: Batch, row: int, pieces: list[NDArray[Any]], bos_id: int, weights: list[NDArray[Any]] | None = None
) -> None:
    """Writes pieces of bodies into an empty row of a batch, one segment each. Without `weights` all are 1."""
    start = 0
    for segment, piece in enumerate(pieces, start=1):
        stop = start + len(piece)
        batch.tokens[row, start] = bos_id
        batch.tokens[row, start + 1 : stop] = piece[:-1]
        batch.targets[row, start:stop] = piece
        batch.loss_weights[row, start:stop] = 1 if weights is None else weights[segment - 1]
        batch.positions[row, start:stop] = np.arange(len(piece))
        batch.segment_ids[row, start:stop] = segment
        start = stop
