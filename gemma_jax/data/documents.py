"""Opens corpora by name: turns an entry of data.sources into a `Source` of documents."""

import re
from collections.abc import Iterator, Sequence

from gemma_jax.config.sections import DataConfig
from gemma_jax.data.files import GLOB_CHARACTERS, matching_files
from gemma_jax.data.huggingface_source import HuggingFaceDataset, find_dataset
from gemma_jax.data.parquet_source import Parquet
from gemma_jax.data.record_source import TextRecords, TokenRecords, find_builder, open_tfds
from gemma_jax.data.source import LongText, Records, Source, Text, is_held_out
from gemma_jax.data.text_source import JsonLines, PythonStdlib, TextFiles
from gemma_jax.errors import UserError
from gemma_jax.paths import user_path

_KINDS: dict[str, tuple[str, type[Records]]] = {
    "JSON lines": (r"(?i)\.(jsonl|ndjson|json)(\.(gz|bz2|zst))?$", JsonLines),
    "Parquet files": (r"(?i)\.parquet$", Parquet),
    "ArrayRecord files": (r"\.array_record(-\d+-of-\d+)?$", TextRecords),
    "text files": ("", TextFiles),
}
_TOKENS = re.compile(r"tokens:(?P<dtype>[^:]*):(?P<path>.+)")
_SAMPLED_SHARDS = 32


def open_sources(data: DataConfig) -> list[Source]:
    """Opens the corpora that a config names. Raises UserError as `open_source` does."""
    return [
        open_source(spec, text_field=data.text_field, bad_records=data.bad_records) for spec in data.sources
    ]


def open_source(spec: str, *, text_field: str, bad_records: str, all_fields: bool = False) -> Records:
    """Opens a corpus without reading its documents.

    Args:
      spec: One of: `python-stdlib`; `tfds:NAME[/config][:version]`; a directory that TFDS prepared;
        `tokens:uint16:PATH` or `tokens:uint32:PATH`, ArrayRecord files in which each record holds the token
        ids of one document as raw little-endian integers; `hf:NAME`, `hf:NAME:SPLIT` or
        `hf:NAME:CONFIG:SPLIT` of the datasets package; or the path or glob (`**` included), local or in a
        bucket, of JSON lines (.jsonl, .ndjson, .json; a .json file may be an array), of .parquet files, of
        .array_record files of text, or of text files with one document each. JSON and text may be compressed
        (.gz, .bz2, .zst).
      text_field: The field or column that holds the text.
      bad_records: What happens at a record without readable text: "error" raises, "skip" leaves it out.
      all_fields: Whether `Records.convert` will read the corpus: records may be without `text_field`.

    Raises:
      UserError: The corpus is unknown, or nothing matches it.
    """
    if spec == "python-stdlib":
        return PythonStdlib(spec)
    if spec.startswith("tfds:") or _is_tfds_directory(spec):
        return open_tfds(spec, text_field, bad_records, all_fields=all_fields)
    if spec.startswith("hf:"):
        return HuggingFaceDataset(spec, text_field, bad_records)
    if spec.startswith("tokens:"):
        dtype, path = _parse_tokens(spec)
        return TokenRecords(spec, matching_files(spec, path), dtype, bad_records)
    files = matching_files(spec, spec)
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise UserError(f"{spec} matches {' and '.join(sorted(kinds))}; name each kind as its own source.")
    _, opened_as = _KINDS[kinds.pop()]
    return opened_as(spec, files, text_field, bad_records, all_fields=all_fields)


def check_source(spec: str) -> None:
    """Raises UserError if a corpus is unknown or no file matches it. Lists file names; reads no documents."""
    if spec.startswith("tfds:"):
        find_builder(spec)
    elif spec.startswith("hf:"):
        find_dataset(spec)
    elif spec != "python-stdlib" and not _is_tfds_directory(spec):
        matching_files(spec, _parse_tokens(spec)[1] if spec.startswith("tokens:") else spec)


def sample_texts(sources: Sequence[Source], megabytes: float, held_out: float) -> Iterator[str]:
    """Yields about `megabytes` * 10**6 bytes of text spread evenly over the corpora, to train a tokenizer on.

    The choice is deterministic: it takes evenly spaced shards of every corpus and, in each, the text blocks
    whose hash is below a threshold. Held-out documents are left out, unless nothing else is found.

    Raises:
      UserError: The corpora have no text.
    """
    total = sum(shard.size for source in sources for shard in source.shards)
    found = False
    for source in sources:
        size = sum(shard.size for shard in source.shards)
        step = -(-len(source.shards) // _SAMPLED_SHARDS)
        chosen = source.shards[::step]
        share = megabytes * 1e6 * size / max(total, 1)
        fraction = share / max(sum(shard.size for shard in chosen), 1)
        for shard in chosen:
            # A compressed shard holds more text than its size in bytes, so stop at the intended share.
            left = fraction * shard.size
            for document in source.read(shard, lambda reason: None):
                if left <= 0:
                    break
                if not isinstance(document, Text | LongText) or is_held_out(document, held_out):
                    continue
                for block in document.blocks():
                    sampled = Text(block)
                    if fraction >= 1 or is_held_out(_rehash(sampled), fraction):
                        found = True
                        left -= sampled.num_bytes
                        yield block
    # With too few documents, all of them may be on the held-out side. Pieces of them are then held out
    # instead, and which ones is known only after tokenizing, so sample from all documents.
    if not found and held_out:
        yield from sample_texts(sources, megabytes, 0.0)
    elif not found:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"There is no text in {names} to train a tokenizer on; set tokenizer.path.")


def _rehash(text: Text) -> Text:
    # A document that is one block has the same hash as the block, and that hash already decided its split, so
    # sampling uses another hash.
    return Text(f"sample {text.digest.hex()}")


def _kind(file: str) -> str:
    return next(kind for kind, (name, _) in _KINDS.items() if re.search(name, file))


def _parse_tokens(spec: str) -> tuple[str, str]:
    match = _TOKENS.fullmatch(spec)
    if match is None or match["dtype"] not in ("uint16", "uint32"):
        raise UserError(f"{spec}: write tokens:uint16:PATH or tokens:uint32:PATH, as the records are.")
    return match["dtype"], match["path"]


def _is_tfds_directory(spec: str) -> bool:
    return not GLOB_CHARACTERS.search(spec) and (user_path(spec) / "dataset_info.json").exists()
