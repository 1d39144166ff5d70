import os
from pathlib import Path

import numpy as np
import pytest
from corpora import cache_of, random_texts, read_all

from gemma_jax.data import source as source_module
from gemma_jax.data.rows import PackedRows
from gemma_jax.data.source import SPLITS, Text, is_held_out
from gemma_jax.data.token_cache import TokenCache
from gemma_jax.errors import UserError
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming

LENGTH = 64


@pytest.fixture
def cache(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> TokenCache:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 8000)
    return cache_of(random_texts(120), tokenizer, tmp_path, held_out=0.2)


def test_all_documents_can_be_put_together_from_all_rows(cache: TokenCache, tokenizer: Tokenizer) -> None:
    assert len(cache.shards) > 3
    texts = random_texts(120)
    for split in SPLITS:
        rows = PackedRows(cache, split, LENGTH)
        batch = read_all(rows, tokenizer)
        bodies: dict[str, list[tuple[int, list[int]]]] = {}
        for row in range(len(rows)):
            for segment, origin in enumerate(rows.origin(row), start=1):
                targets = batch.targets[row][batch.segment_ids[row] == segment].tolist()
                assert len(targets) == origin.stop - origin.start
                bodies.setdefault(origin.place, []).append((origin.start, targets))
        mine = {
            str(Path(cache.source.shards[0].files[0]).parent / f"{number:06d}.txt"): text
            for number, text in enumerate(texts)
            if is_held_out(Text(text), 0.2) == (split == "held_out")
        }
        rebuilt = {place: sum((ids for _, ids in sorted(parts)), []) for place, parts in bodies.items()}
        assert rebuilt == {place: [*tokenizer.encode(text), 1] for place, text in mine.items()}
        assert batch.loss_weights.sum() == cache.size(split).tokens == rows.size.tokens
        assert rows.utilisation == batch.loss_weights.mean()


@pytest.mark.parametrize("kind", ["pieces", "starts"])
@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "foreign", "shorter"])
def test_a_damaged_index_is_built_again(
    cache: TokenCache, tokenizer: Tokenizer, kind: str, damage: str
) -> None:
    first = read_all(PackedRows(cache, "train", LENGTH), tokenizer)
    path = Path(cache.shards[1].path("train", f"rows-{LENGTH}.{kind}.npy"))
    if damage == "gone":
        path.unlink()
    elif damage == "shorter":
        np.save(path, np.load(path)[:-1])
    elif damage == "foreign":
        whole = np.load(path)
        np.save(path, whole.astype(np.float64) if kind == "starts" else np.zeros(len(whole)))
    else:
        path.write_bytes(path.read_bytes()[:-5] if damage == "cut" else b"")
    again = read_all(PackedRows(cache, "train", LENGTH), tokenizer)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("file", ["ids", "pieces", "starts", "values"])
def test_damage_under_way_is_named_and_never_trained_on(
    cache: TokenCache, tokenizer: Tokenizer, file: str
) -> None:
    """This includes damage that would end the process if the files were memory maps."""
    rows = PackedRows(cache, "train", LENGTH)
    read_all(rows, tokenizer)
    ids = Path(cache.shards[0].path("train", "ids"))
    if file == "values":
        ids.write_bytes(b"\xff\xff" * (ids.stat().st_size // 2))
    else:
        os.truncate(ids if file == "ids" else ids.with_name(f"00000.train.rows-{LENGTH}.{file}.npy"), 131)
    with pytest.raises(UserError, match=naming(ids.parent, "shard 0", "delete")):
        read_all(rows, tokenizer)
    ids.unlink()
    with pytest.raises(UserError, match="00000.train.ids"):
        read_all(PackedRows(cache, "train", LENGTH), tokenizer)


@pytest.mark.parametrize(
    ("count", "copies", "held_out", "length"),
    [(1, 1, 0.01, 16), (3, 1, 0.01, 16), (3, 2, 0.05, 16), (2, 1, 0.9999, 16), (3, 1, 0.01, 10_000)],
)
def test_too_few_documents_hold_out_pieces_which_are_never_trained_on(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    copies: int,
    held_out: float,
    length: int,
) -> None:
    monkeypatch.setattr(source_module, "SHARD_BYTES", 2000)
    texts = random_texts(count, seed=5)
    texts = (texts + texts[::-1])[: count * copies]  # equal ones in other places
    found = []
    for folder in ("one", "another"):  # as on two hosts
        cache = cache_of(texts, tokenizer, tmp_path / folder, held_out)
        assert cache.by_pieces
        train, held = (PackedRows(cache, split, length) for split in SPLITS)
        batches = [read_all(rows, tokenizer) for rows in (train, held)]
        found.append(batches)
        pieces = [
            [
                tuple(targets[ids == segment].tolist())
                for targets, ids in zip(batch.targets, batch.segment_ids, strict=True)
                for segment in range(1, ids.max() + 1)
            ]
            for batch in batches
        ]
        assert pieces[0] and pieces[1] and not set(pieces[0]) & set(pieces[1])
        bodies = [[*tokenizer.encode(text), 1] for text in texts]
        everything = [tuple(body[at : at + length]) for body in bodies for at in range(0, len(body), length)]
        assert sorted([*pieces[0], *pieces[1]]) == sorted(everything)
        assert [train.size.tokens, held.size.tokens] == [batch.loss_weights.sum() for batch in batches]
        assert len(train.origin(0)) == batches[0].segment_ids[0].max()
    for one, another in zip(*found, strict=True):
        assert all((a == b).all() for a, b in zip(one, another, strict=True))
