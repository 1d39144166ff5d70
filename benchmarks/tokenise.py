"""Measures speed and peak memory of tokenising and packing a large corpus.

Writes the Python sources of this installation as JSON lines, repeatedly, with another number in front of each
document; tokenises and packs them as a run does; and deletes everything. With `--tokenizer none`, each four
bytes of text become one id without SentencePiece: this shows the memory use for a corpus that SentencePiece
would need an hour for. Prints one JSON line.

    python benchmarks/tokenise.py [--gigabytes 1] [--tokenizer none|2048|8192] [--folder /tmp]
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gemma_jax.config import DataConfig
from gemma_jax.data.documents import open_source, sample_texts
from gemma_jax.data.loader import prepare
from gemma_jax.data.source import Source, Text
from gemma_jax.tokenizer import Tokenizer


class EveryFourBytes(Tokenizer):
    """Replaces SentencePiece: makes one id of each four bytes by arithmetic."""

    def __init__(self) -> None:
        self.vocab_size = 2048
        self.fingerprint = "every four bytes"

    def encode_batch(self, texts: Sequence[str], num_threads: int = -1) -> list[list[int]]:
        return [self._ids(text.encode()) for text in texts]

    def _ids(self, text: bytes) -> list[int]:
        numbers = np.frombuffer(text[: len(text) // 4 * 4], "<u4")
        return (numbers % 1700 + 300).tolist()


def documents(source: Source) -> Iterator[str]:
    for shard in source.shards:
        for document in source.read(shard, lambda reason: None):
            if isinstance(document, Text):
                yield document.text


def write_corpus(path: Path, source: Source, gigabytes: float) -> None:
    lines = [json.dumps({"text": " " + text})[len('{"text": "') :].encode() for text in documents(source)]
    with path.open("wb") as file:
        number = 0
        while file.tell() < gigabytes * 1e9:
            for line in lines:
                number += 1
                file.write(b'{"text": "%d%s\n' % (number, line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tokenizer", default="none", help="none, or the number of pieces")
    parser.add_argument("--folder", help="where the corpus and its tokens lie meanwhile")
    arguments = parser.parse_args()
    source = open_source("python-stdlib", text_field="text", bad_records="error")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, source, arguments.gigabytes)
        if arguments.tokenizer == "none":
            tokenizer: Tokenizer = EveryFourBytes()
        else:
            model = Path(folder) / "tokenizer.model"
            tokenizer = Tokenizer.train(sample_texts([source], 8, 0.0), int(arguments.tokenizer), model)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, cpu = time.perf_counter(), time.process_time()
        data = DataConfig(sources=(str(corpus),), cache_dir=folder)
        [statistics] = prepare(data, tokenizer, 0).statistics
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        tokens = statistics.train.tokens + statistics.held_out.tokens
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # The peak of the largest child process; a machine with eight cores or more starts several.
        of_a_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        result = {
            **vars(arguments),
            "bytes": corpus.stat().st_size,
            "tokens": tokens,
            "rows_full": round(statistics.utilisation, 4),
            "tokens_per_second": round(tokens / seconds),
            "tokens_per_cpu_second": round(tokens / cpu),
            "peak_megabytes_before": before // 1024,
            "peak_megabytes": peak // 1024,
            "peak_megabytes_of_a_child": of_a_child // 1024,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
