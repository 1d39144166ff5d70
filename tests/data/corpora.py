"""Corpora for the tests of this folder, and what is made of them."""

import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from gemma_jax.data.documents import open_source
from gemma_jax.data.packing import Batch, empty_rows
from gemma_jax.data.rows import PackedRows
from gemma_jax.data.source import Source, Text
from gemma_jax.data.token_cache import TokenCache, build_token_cache
from gemma_jax.tokenizer import Tokenizer


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of a few to a few hundred words."""
    generator = random.Random(seed)
    words = ["def", "return", "  x", "naïve", "数", "self", "\n", "\n\n", "(", "):", "0", "12", "the"]
    return [
        f"{seed}.{number} " + " ".join(generator.choices(words, k=generator.randint(1, 200)))
        for number in range(count)
    ]


def write_texts(folder: Path, texts: Sequence[str]) -> str:
    """Writes one file per document, and returns a glob that matches them all in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8", newline="")
    return str(folder / "*.txt")


def open_default(spec: str, text_field: str = "text", bad_records: str = "error") -> Source:
    return open_source(spec, text_field=text_field, bad_records=bad_records)


def all_texts(source: Source) -> list[str]:
    """Returns the text of every document; the blocks of a LongText are joined."""

    def fail(reason: str) -> None:
        raise AssertionError(f"skipped: {reason}")

    texts = []
    for shard in source.shards:
        for document in source.read(shard, fail):
            assert isinstance(document, Text)
            texts.append(document.text)
    return texts


def build(
    source: Source, tokenizer: Tokenizer, folder: Path, held_out: float = 0.0, **options: Any
) -> TokenCache:
    return build_token_cache(source, tokenizer, held_out=held_out, cache_dir=str(folder), **options)


def cache_of(texts: Sequence[str], tokenizer: Tokenizer, folder: Path, held_out: float = 0.0) -> TokenCache:
    return build(open_default(write_texts(folder / "texts", texts)), tokenizer, folder / "cache", held_out)


def read_all(rows: PackedRows, tokenizer: Tokenizer) -> Batch:
    batch = empty_rows(len(rows), rows.sequence_length, tokenizer.pad_id)
    for row in range(len(rows)):
        rows.read_into(batch, row, row, tokenizer.bos_id)
    return batch


def write_records(path: Path, records: Sequence[bytes]) -> str:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited proto field."""
    length = len(content)
    varint = b""
    while length > 127:
        varint += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + content


def example(**features: str) -> bytes:
    """A serialised tf.train.Example with string features and one of numbers."""
    entries = b"".join(
        field(1, field(1, name.encode()) + field(2, field(1, field(1, text.encode()))))
        for name, text in features.items()
    )
    floats = field(1, field(1, b"score") + field(2, field(2, field(1, struct.pack("<f", 1.5)))))
    return field(1, entries + floats)
