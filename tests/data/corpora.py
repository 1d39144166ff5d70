"""Corpora for the tests of this folder, and what is made of them."""

import random
from collections.abc import Sequence
from pathlib import Path

from gemma_jax.data.documents import open_source
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
    """One file a document; gives back the glob that names them all in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8", newline="")
    return str(folder / "*.txt")


def open_default(spec: str, text_field: str = "text", bad_records: str = "error") -> Source:
    return open_source(spec, text_field=text_field, bad_records=bad_records)


def all_texts(source: Source) -> list[str]:
    """Every document's text, with LongText put together again."""

    def fail(reason: str) -> None:
        raise AssertionError(f"skipped: {reason}")

    texts = []
    for shard in source.shards:
        for document in source.read(shard, fail):
            assert isinstance(document, Text)
            texts.append(document.text)
    return texts


def cache_of(texts: Sequence[str], tokenizer: Tokenizer, folder: Path, held_out: float = 0.0) -> TokenCache:
    source = open_default(write_texts(folder / "texts", texts))
    return build_token_cache(source, tokenizer, held_out=held_out, cache_dir=str(folder / "cache"))
