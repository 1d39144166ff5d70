import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.data.packing import (
    best_fit_decreasing,
    build_row_index,
    cut_documents,
    empty_rows,
    fill_row,
)

BOS, EOS, PAD = 2, 1, 0


def test_a_row_is_laid_out_as_the_picture_in_the_docstring_says() -> None:
    batch = empty_rows(1, 8, PAD)
    fill_row(batch, 0, [np.array([11, 12, 13, EOS]), np.array([14, 15, EOS])], BOS)
    assert batch.tokens.tolist() == [[BOS, 11, 12, 13, BOS, 14, 15, PAD]]
    assert batch.targets.tolist() == [[11, 12, 13, EOS, 14, 15, EOS, PAD]]
    assert batch.loss_weights.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert [array.dtype.name for array in batch] == ["int32", "int32", "float32", "int32", "int32"]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), sequence_length=st.integers(1, 40))
def test_every_token_of_every_document_is_predicted_exactly_once(
    lengths: list[int], sequence_length: int
) -> None:
    # Token values are their own place in the stream, and so name document and position.
    stream = np.arange(3, 3 + sum(lengths))
    pieces = cut_documents(np.array(lengths), sequence_length)
    index = build_row_index(pieces, pieces["length"], sequence_length)
    batch = empty_rows(len(index), sequence_length, PAD)
    for row in range(len(index)):
        pieces = index.pieces[index.starts[row] : index.starts[row + 1]].tolist()
        assert pieces
        fill_row(batch, row, [stream[o : o + n] for o, n in pieces], BOS)
    used = batch.loss_weights == 1
    assert sorted(batch.targets[used].tolist()) == stream.tolist()
    assert (batch.segment_ids[used] > 0).all()
    assert (batch.targets[~used] == PAD).all() and (batch.tokens[~used] == PAD).all()
    assert (batch.segment_ids[~used] == 0).all() and (batch.loss_weights[~used] == 0).all()
    starts_document = {*np.cumsum([3, *lengths]).tolist()}
    for tokens, targets, positions, segments in zip(
        batch.tokens, batch.targets, batch.positions, batch.segment_ids, strict=True
    ):
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            assert positions[where].tolist() == list(range(where.sum()))
            body = targets[where]
            assert tokens[where].tolist() == [BOS, *body[:-1]]
            assert (np.diff(body) == 1).all()
            assert not starts_document.intersection(body[1:].tolist()), "a segment holds two documents"


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80), capacity=st.integers(30, 40))
def test_packing_equals_naive_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [place for place, space in enumerate(free) if space >= length]
        if fits:
            free[min(fits, key=lambda place: free[place])] -= length
        else:
            free.append(capacity - length)
    bins = best_fit_decreasing(np.array(lengths), capacity)
    assert sorted(capacity - np.bincount(bins, weights=lengths)) == sorted(free)


def test_rows_follow_the_order_of_documents() -> None:
    pieces = cut_documents(np.random.default_rng(0).integers(1, 50, 500), 64)
    index = build_row_index(pieces, pieces["length"], 64)
    first = index.pieces["offset"][index.starts[:-1]]
    assert (np.diff(first) > 0).all()
