"""The GGUF format: nothing of a file is believed."""

import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from gemma_jax.errors import UserError
from gemma_jax.pretrained.gguf_file import GGUFFile
from gemma_jax.tokenizer import Tokenizer
from tests.pretrained.damage import damaged
from tests.pretrained.gguf_files import read_all, write


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(*parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


SHORT = entry("a", 4, bytes(4))
BROKEN = {  # a header, which is padded and has 32 bytes of data after it, and a part of the message
    "magic": (b"GGML" + header()[4:], "GGML"),
    "version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "version 50331648"),
    "keys": (header(keys=2**63), "keys"),
    "tensors": (header(tensors=2**40), "tensors"),
    "twice": (header(SHORT, SHORT, keys=2), "'a' twice"),
    "type": (header(entry("a", 13, bytes(4)), keys=1), "unknown type 13"),
    "long key": (header(struct.pack("<Q", 2**63) + b"a", keys=1), "does not end"),
    "long string": (header(entry("a", 8, struct.pack("<Q", 2**64 - 1)), keys=1), "does not end"),
    "long array": (header(entry("a", 9, array(12, 2**62)), keys=1), "does not end"),
    "many strings": (header(entry("a", 9, array(8, 2**60)), keys=1), "longer than the header"),
    "long string of many": (
        header(entry("a", 9, array(8, 2, struct.pack("<Q", 2**60))), keys=1),
        "longer than the header",
    ),
    "nested": (header(entry("a", 9, array(9, 1, array(9, 1, array(4, 0)))), keys=1), "array of the type 9"),
    "alignment": (header(entry("general.alignment", 4, struct.pack("<I", 24)), keys=1), "is 24"),
    "no alignment": (header(entry("general.alignment", 4, struct.pack("<I", 0)), keys=1), "is 0"),
    "same tensor": (header(tensor("a"), tensor("a"), tensors=2), "'a' twice"),
    "axes": (header(tensor("a", (2, 2, 2, 1, 1)), tensors=1), "5 axes"),
    "overflow": (header(tensor("a", (2**62, 2**62)), tensors=1), "'a' ends"),
    "beyond": (header(tensor("a", (9,)), tensors=1), "'a' ends"),
    "overlap": (header(tensor("a"), tensor("b"), tensors=2), "begins at"),
    "misaligned": (header(tensor("a", (4,), offset=16), tensors=1), "'a' begins"),
    "far": (header(tensor("a", offset=2**63), tensors=1), "'a' begins"),
    "tensor type": (header(tensor("a", kind=5), tensors=1), "unknown type 5"),
    "block": (header(tensor("a", (8,), kind=2), tensors=1), "multiple of 32"),
    "hidden": (header(), "belong to nothing"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, fault: str) -> None:
    def write_raw(name: str, raw: bytes) -> Path:
        (tmp_path / name).write_bytes(raw.ljust(-(-len(raw) // 32) * 32, b"\0") + bytes(32))
        return tmp_path / name

    raw, said = BROKEN[fault]
    with pytest.raises(UserError, match=r"model\.gguf") as error:
        GGUFFile(write_raw("model.gguf", raw))
    assert said in str(error.value) and len(str(error.value)) < 600
    (tmp_path / "short").write_bytes(header()[:23])
    with pytest.raises(UserError, match="it has 23 bytes"):
        GGUFFile(tmp_path / "short")
    arrays = entry("b", 9, array(8, 2, text("x") + text(""))), entry("c", 9, array(6, 1, bytes(4)))
    whole = GGUFFile(write_raw("whole.gguf", header(SHORT, *arrays, tensor("a"), keys=3, tensors=1)))
    assert (
        whole.metadata["b"] == [b"x", b""] and whole.metadata["c"].format == "f" and whole["a"].shape == (8,)
    )


def change_numbers(rng: random.Random, raw: bytearray, place: int) -> None:
    """Puts a number there that is large or stands for something else."""
    if rng.random() < 0.5:
        number = rng.choice([0, 1, 8, 9, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.randrange(2**16)])
        raw[place : place + 8] = struct.pack("<Q", number)
    else:
        raw[place : place + 4] = struct.pack("<I", rng.choice([0, 1, 8, 9, 30, 2**31]))


def test_six_thousand_damaged_headers_are_read_or_refused(tmp_path: Path) -> None:
    """Never a crash, a hang, or more memory than the file needs."""
    texts = [f"{a} {b} {a * b}\n" for a in range(60) for b in range(60)]
    tokenizer = Tokenizer.train(texts, 378, tmp_path / "tokenizer.model")
    files = []
    for count in (8, 378):  # pieces; with 8 most of the header is of the model
        keys: dict[str, Any] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.eos_token_id": 1}
        pieces = zip(*tokenizer.pieces()[:count], strict=True)
        for name, values in zip(("tokens", "scores", "token_type"), pieces, strict=True):
            keys[f"tokenizer.ggml.{name}"] = list(values)
        keys |= {"tokenizer.ggml.model": "none"} if count == 8 else {}
        path = write(tmp_path / f"{count}.gguf", keys, {"token_embd.weight": (count, 32)}, "Q8_0")
        size = min(stored.start for stored in GGUFFile(path).tensors.values())
        files.append((path.read_bytes()[:size], path.read_bytes()[size:]))
    rng, refused, whole_ones, started = random.Random(0), 0, 0, time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(6000):
        about, data = files[number % 4 == 0]
        raw = damaged(rng, about, change_numbers) + (data if rng.random() < 0.9 else b"")
        path = tmp_path / str(number % 50)  # a file that is mapped must not be changed
        path.unlink(missing_ok=True)
        path.write_bytes(raw)
        before = time.process_time()
        try:
            read_all(path)
        except UserError as error:
            refused += str(path) in str(error) and len(str(error)) < 700
        else:
            whole_ones += 1
        assert time.process_time() - before < 1, number
    assert refused > 4000 and whole_ones > 100 and refused + whole_ones == 6000
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # in kB
