"""Named corpora: from what a user writes in data.sources to a `Source` of documents."""

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence

from gemma_jax.data.source import LongText, Source, Text, is_held_out
from gemma_jax.errors import UserError
from gemma_jax.paths import user_path

_JSON_LINES = re.compile(r"\.jsonl(\.gz|\.zst)?$")
_ARRAY_RECORD = re.compile(r"\.array_record(-\d+-of-\d+)?$")
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_TOKENS = re.compile(r"tokens:(?P<dtype>[^:]*):(?P<path>.+)")
_SAMPLED_SHARDS = 32


def open_source(spec: str, *, text_field: str, bad_records: str) -> Source:
    """Opens a corpus without reading its documents.

    Args:
      spec: `python-stdlib`; `tfds:NAME[/config][:version]`; a directory that TFDS prepared;
        `tokens:uint16:PATH` or `tokens:uint32:PATH`, ArrayRecord files whose records are one document's
        token ids each, as raw little-endian integers; or the path or glob (`**` too), local or in a bucket,
        of .jsonl[.gz|.zst] files, of .array_record files of text, or of text files, one document each.
      text_field: The field of JSON, TFDS and tf.train.Example records that holds the text.
      bad_records: "error" or "skip": what a record without readable text leads to.

    Raises:
      UserError: The corpus is unknown, or nothing matches it.
    """
    if spec == "python-stdlib":
        from gemma_jax.data.text_source import PythonStdlib

        return PythonStdlib(spec)
    if spec.startswith("tfds:") or _is_tfds_directory(spec):
        from gemma_jax.data.record_source import TfdsRecords

        return TfdsRecords(spec, text_field, bad_records)
    if spec.startswith("tokens:"):
        from gemma_jax.data.record_source import TokenRecords

        dtype, path = _parse_tokens(spec)
        return TokenRecords(spec, _matching_files(spec, path), dtype, bad_records)
    files = _matching_files(spec, spec)
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise UserError(f"{spec} matches {' and '.join(sorted(kinds))}; name each kind as its own source.")
    if kinds == {"ArrayRecord files"}:
        from gemma_jax.data.record_source import TextRecords

        return TextRecords(spec, files, text_field, bad_records)
    from gemma_jax.data.text_source import JsonLines, TextFiles

    if kinds == {"JSON lines"}:
        return JsonLines(spec, files, text_field, bad_records)
    return TextFiles(spec, files, bad_records)


def check_source(spec: str) -> None:
    """Raises UserError if a corpus is unknown or nothing matches it. Lists names, reads no documents."""
    if spec.startswith("tfds:"):
        from gemma_jax.data.record_source import find_builder

        find_builder(spec)
    elif spec.startswith("tokens:"):
        _matching_files(spec, _parse_tokens(spec)[1])
    elif spec != "python-stdlib" and not _is_tfds_directory(spec):
        _matching_files(spec, spec)


def sample_texts(sources: Sequence[Source], megabytes: float, held_out: float) -> Iterator[str]:
    """Yields about `megabytes` * 10**6 bytes of text spread evenly over the corpora, to train a tokenizer on.

    Deterministic: evenly spaced shards of every corpus, and in each the blocks of documents whose hash is
    below a threshold. Nothing is yielded of held-out documents.

    Raises:
      UserError: The corpora hold token ids only.
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
            # Compressed shards hold more than their size says: stop at the share that was meant.
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
    if not found:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"There is no text in {names} to train a tokenizer on; set tokenizer.path.")


def _rehash(text: Text) -> Text:
    # A document shorter than a block has the hash that the held-out split looked at already.
    return Text(f"sample {text.digest.hex()}")


def _kind(file: str) -> str:
    if _JSON_LINES.search(file):
        return "JSON lines"
    return "ArrayRecord files" if _ARRAY_RECORD.search(file) else "text files"


def _parse_tokens(spec: str) -> tuple[str, str]:
    match = _TOKENS.fullmatch(spec)
    if match is None or match["dtype"] not in ("uint16", "uint32"):
        raise UserError(f"{spec}: write tokens:uint16:PATH or tokens:uint32:PATH, as the records are.")
    return match["dtype"], match["path"]


def _is_tfds_directory(spec: str) -> bool:
    return not _GLOB_CHARACTERS.search(spec) and (user_path(spec) / "dataset_info.json").exists()


def _matching_files(spec: str, pattern: str) -> list[str]:
    """The files that a path or glob names, in sorted order."""
    if "://" in pattern:
        return _matching_bucket_files(spec, pattern)
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [os.path.abspath(pattern)]
    if os.path.isdir(pattern):
        raise UserError(
            f"{spec} is a directory that TFDS did not prepare; "
            f"name its files, as in {pattern.rstrip('/')}/**/*.txt."
        )
    files = [os.path.abspath(file) for file in glob.iglob(pattern, recursive=True) if os.path.isfile(file)]
    if not files:
        raise UserError(
            f"No corpus {spec!r}: no file and no known corpus has this name{_suggestion(pattern)}"
        )
    return sorted(files)


def _matching_bucket_files(spec: str, pattern: str) -> list[str]:
    if not _GLOB_CHARACTERS.search(pattern):
        path = user_path(pattern)
        files = [path] if path.exists() else []
    else:
        parts = pattern.split("/")
        literal = next(i for i, part in enumerate(parts) if _GLOB_CHARACTERS.search(part))
        found = user_path("/".join(parts[:literal])).glob("/".join(parts[literal:]))
        files = [file for file in found if not file.is_dir()]
    if not files:
        raise UserError(f"No corpus {spec!r}: nothing in the bucket matches it; check the address.")
    return sorted(os.fspath(file) for file in files)


def _suggestion(pattern: str) -> str:
    """Names the known corpus or the neighbouring file whose name is nearest, if one is near."""
    parent, name = os.path.split(pattern)
    near = difflib.get_close_matches(pattern, ["python-stdlib"], 1)
    if not near and os.path.isdir(parent or "."):
        names = difflib.get_close_matches(name, os.listdir(parent or "."), 1)
        near = [os.path.join(parent, neighbour) for neighbour in names]
    return f"; did you mean {near[0]}?" if near else "; check the path."
