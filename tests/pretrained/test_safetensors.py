"""The safetensors format: tensors are read as written, and everything in a file is checked."""

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gemma_jax.errors import UserError
from gemma_jax.pretrained.huggingface import HuggingFaceDirectory
from gemma_jax.pretrained.layout import in_order
from gemma_jax.pretrained.safetensors import SafetensorsFile, write_safetensors
from tests.messages import naming
from tests.pretrained.damage import damaged
from tests.pretrained.published import MULTI_QUERY, random_tensors, safetensors_bytes, write_huggingface

Header = dict[str, Any]


def file_of(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    f32, f16, bf16 = (np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))
    for dtypes in ([f32] * 4, [f16] * 4, [bf16] * 4, [bf16, f32, f16, bf16]):
        arrays = {
            f"x{i}": rng.normal(size=shape).astype(dtypes[i])
            for i, shape in enumerate([(3, 5), (7,), (), (0, 4)])
        }
        shapes = {name: x.shape for name, x in arrays.items()}
        written = write_safetensors(tmp_path / "f", shapes, arrays.__getitem__)
        assert list(written.values()) == list(map(str, dtypes))
        file = SafetensorsFile(tmp_path / "f")
        assert list(file.tensors) == list(arrays)
        for name, x in arrays.items():
            file.check(name)
            assert file[name].dtype == x.dtype and file[name].shape == x.shape
            assert file[name].tobytes() == x.tobytes()
            assert not file[name].flags.writeable


FAULTS: dict[str, tuple[Any, int]] = {  # header, and bytes that follow it
    "no JSON": (b"{", 0),
    "no object": ([1], 0),
    "twice": (b'{"__metadata__":{},"__metadata__":{}}', 0),
    "deep": (b"[" * 100_000, 0),
    "metadata": ({"__metadata__": {"format": 1}}, 0),
    "no entry": ({"a": 3}, 0),
    "dtype": ({"a": entry("F33")}, 8),
    "negative size": ({"a": entry(shape=[-2])}, 8),
    "two negative sizes": ({"a": entry(shape=[-2, -1])}, 8),
    "overflow": ({"a": entry(shape=[2**62, 2**62])}, 8),
    "wrong size": ({"a": entry(offsets=[0, 4])}, 4),
    "backwards": ({"a": entry(offsets=[8, 0])}, 8),
    "beyond the end": ({"a": entry(), "b": entry(offsets=[8, 16])}, 12),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, 12),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, 20),
    "hidden bytes": ({"a": entry()}, 12),
    "checksums": ({"__metadata__": {"crc32": "[1"}}, 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, fault: str) -> None:
    header, size = FAULTS[fault]
    with pytest.raises(UserError, match=r"model\.safetensors") as error:
        SafetensorsFile(file_of(tmp_path / "model.safetensors", header, bytes(size)))
    assert len(str(error.value)) < 600
    SafetensorsFile(
        file_of(
            tmp_path / "whole.safetensors", {"a": entry(), "b": entry("BF16", (2, 2), (8, 16))}, bytes(16)
        )
    )


def test_a_file_that_is_too_short_or_claims_too_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234567")
    with pytest.raises(UserError, match=naming(tmp_path / "a", "7 bytes")):
        SafetensorsFile(tmp_path / "a")
    for length in (3, 2**40, 2**64 - 1):
        with pytest.raises(UserError, match=naming(tmp_path / "a", "header", f"{length:,}")):
            SafetensorsFile(file_of(tmp_path / "a", b"{}", length=length))
    (tmp_path / "folder").mkdir()
    for name in ("missing", "folder"):
        with pytest.raises(UserError, match=naming(tmp_path / name)):
            SafetensorsFile(tmp_path / name)


def test_a_flipped_bit_in_numbers_that_we_wrote_is_told(tmp_path: Path) -> None:
    x = np.arange(100, dtype=np.float32)
    write_safetensors(tmp_path / "f", {"x": (50,), "y": (50,)}, lambda n: x[:50] + (n == "y"))
    raw = bytearray((tmp_path / "f").read_bytes())
    raw[-30] ^= 4
    (tmp_path / "f").write_bytes(raw)
    file = SafetensorsFile(tmp_path / "f")
    file.check("x")
    with pytest.raises(UserError, match="'y'"):
        file.check("y")


WORDS = [b"\x00", b"e999", b"9" * 400, b"\xff", *b'[ { " - F32 shape null true ../x'.split()]


def change_text(rng: random.Random, raw: bytearray, place: int) -> None:
    """Puts a word there, or changes the length of the header."""
    if rng.random() < 0.5:
        raw[place : place + rng.choice([0, 3])] = rng.choice(WORDS)
    else:
        raw[:8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**64 - 1, rng.randrange(5000)]))


@pytest.mark.slow
def test_ten_thousand_damaged_headers_are_read_or_refused(tmp_path: Path) -> None:
    """Never a crash, a hang, or more numbers than the file has."""
    rng, refused = random.Random(0), 0
    tensors = random_tensors(MULTI_QUERY | {"num_hidden_layers": 1, "vocab_size": 10}, "bfloat16")
    whole = safetensors_bytes(tensors)
    header = whole[: 8 + struct.unpack("<Q", whole[:8])[0] + 40]
    for number in range(12_000):
        raw = damaged(rng, header, change_text) + (whole[len(header) :] if rng.random() < 0.9 else b"")
        path = tmp_path / str(number % 50)  # a file that is mapped must not be changed
        path.unlink(missing_ok=True)
        path.write_bytes(raw)
        started = time.process_time()
        try:
            file = SafetensorsFile(path)
        except UserError:
            refused += 1
        else:
            assert sum(file[name].nbytes for name in file.tensors) <= len(raw)
            assert all(file[name].tobytes() is not None for name in file.tensors)
        assert time.process_time() - started < 10  # of the processor: a hang, not a busy machine
    assert 6_000 < refused < 12_000


@pytest.mark.slow
def test_ten_thousand_damaged_directories_are_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json and the index: never a crash, a hang, or a file outside the directory that is opened."""
    config = MULTI_QUERY | {"num_hidden_layers": 1, "vocab_size": 10}
    folder = write_huggingface(tmp_path / "model", config, random_tensors(config, "bfloat16"), 2)
    (tmp_path / "outside.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    opened: list[Path] = []
    real = SafetensorsFile.__init__

    def watched(self: SafetensorsFile, path: Path) -> None:
        opened.append(path)
        real(self, path)

    monkeypatch.setattr(SafetensorsFile, "__init__", watched)
    rng, refused = random.Random(1), 0
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors.index.json")}
    for number in range(12_000):
        name = list(files)[number % 2]
        (folder / name).write_bytes(damaged(rng, files[name], change_text))
        started = time.process_time()
        try:
            found = HuggingFaceDirectory(folder)
            assert all(found.get(*place).size for place in in_order(found.config))
        except UserError:
            refused += 1
        assert time.process_time() - started < 10  # of the processor: a hang, not a busy machine
        (folder / name).write_bytes(files[name])
    assert 6_000 < refused < 12_000
    assert {path.parent for path in opened} == {folder}
