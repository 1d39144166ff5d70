"""Weights are written and read back bit for bit, and a failed export leaves no files."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import ComputeConfig, MeshConfig
from gemma_jax.errors import UserError
from gemma_jax.model import ModelSpec
from gemma_jax.pretrained import export as export_module
from gemma_jax.pretrained import huggingface as huggingface_module
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.pretrained.layout import Weights, in_order
from gemma_jax.testing import cpu_mesh, tiny_gemma
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming
from tests.pretrained.published import MULTI_HEAD, MULTI_QUERY, TYPES, random_tensors, write_huggingface

ONE = MeshConfig(cpu_devices=1)


def numbers(folder: Path) -> dict[tuple[str, int | None], bytes]:
    found = open_checkpoint(folder)
    weights: Weights | None = found.weights
    if weights is None:
        compute = ComputeConfig(param_dtype=found.dtype)
        spec = ModelSpec(found.config, compute, cpu_mesh(1))
        weights = export_module.PlacedWeights(found.params(spec), spec)
    return {place: weights.get(*place).tobytes() for place in in_order(found.config)}


def convert(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [MULTI_QUERY, MULTI_HEAD], ids=["multi-query", "multi-head"])
def test_every_bit_comes_back_from_every_form(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    source = write_huggingface(tmp_path / "source", config, random_tensors(config, dtype))
    original = numbers(source)
    convert(source, tmp_path / "flax", "--format", "flax")
    convert(tmp_path / "flax", tmp_path / "again")
    assert numbers(tmp_path / "flax") == numbers(tmp_path / "again") == original
    for name in ("flax", "again"):
        assert open_checkpoint(tmp_path / name).config == open_checkpoint(source).config
        assert open_checkpoint(tmp_path / name).dtype == dtype
    if config is MULTI_QUERY and dtype == "bfloat16":  # through a run, whose arrays go over a device
        convert(source, tmp_path / "run", "--format", "run")
        convert(tmp_path / "run", tmp_path / "back", "--dtype", dtype)
        assert numbers(tmp_path / "back") == original
        assert (tmp_path / "run" / "config.json").exists()


def test_names_shapes_and_numbers_are_those_of_transformers(tmp_path: Path) -> None:
    tensors = random_tensors(MULTI_HEAD)
    source = write_huggingface(tmp_path / "source", MULTI_HEAD, tensors)
    Gemma.from_pretrained(source, mesh=ONE).save_pretrained(tmp_path / "out")
    file = huggingface_module.SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert file.metadata["format"] == "pt"
    assert file.tensors.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(file[name], x, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in MULTI_HEAD} == MULTI_HEAD


def test_large_weights_are_split_into_shards_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(MULTI_QUERY)
    source = write_huggingface(tmp_path / "source", MULTI_QUERY, tensors)
    monkeypatch.setattr(huggingface_module, "SHARD_BYTES", 40_000)
    convert(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert numbers(tmp_path / "out") == numbers(source)


def test_a_changed_dtype_rounds_and_a_too_small_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(MULTI_QUERY)
    source = write_huggingface(tmp_path / "source", MULTI_QUERY, tensors)
    convert(source, tmp_path / "out", "--dtype", "bfloat16")
    file = huggingface_module.SafetensorsFile(tmp_path / "out" / "model.safetensors")
    for name, x in tensors.items():
        np.testing.assert_array_equal(file[name], x.astype(TYPES["bfloat16"][1]), err_msg=name)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    write_huggingface(source, MULTI_QUERY, tensors)
    assert main(["convert", str(source), str(tmp_path / "f16"), "--dtype", "float16"]) == 2
    assert re.search(naming("model.layers.1.mlp.up_proj.weight", "float16"), capsys.readouterr().err)
    assert not (tmp_path / "f16").exists()


def test_a_model_made_here_can_be_written_with_its_tokenizer_and_end_tokens(tmp_path: Path) -> None:
    texts = [f"{a} {b} {a * b}\n" for a in range(60) for b in range(60)]
    tokenizer = Tokenizer.train(texts, 378, tmp_path / "tokenizer.model")
    made = tiny_gemma(vocab_size=378)
    gemma = Gemma(made.spec, made.params, tokenizer, end_tokens=(1, 107))
    for format in ("huggingface", "flax", "run"):
        gemma.save_pretrained(tmp_path / format, format=format)
        again = Gemma.from_pretrained(tmp_path / format, mesh=ONE)
        np.testing.assert_array_equal(again.logits([[2, 5, 300]]), gemma.logits([[2, 5, 300]]))
        assert again.end_tokens == (1, 107)
        assert again.tokenizer.fingerprint == tokenizer.fingerprint
        assert not (tmp_path / format / "NOTICE").exists()
    about = json.loads((tmp_path / "huggingface" / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "GemmaTokenizer" and about["add_bos_token"] is True
    assert "start_of_turn" in about["chat_template"]


def test_the_notice_goes_with_weights_that_derive_from_gemma(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "source", MULTI_QUERY, random_tensors(MULTI_QUERY))
    convert(source, tmp_path / "a", "--gemma_terms", "yes")
    notice = (tmp_path / "a" / "NOTICE").read_text()
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in notice and str(source) in notice
    convert(tmp_path / "a", tmp_path / "b", "--format", "run")
    convert(tmp_path / "b", tmp_path / "c", "--format", "flax")
    Gemma.from_pretrained(tmp_path / "c", mesh=ONE).save_pretrained(tmp_path / "d")
    for name in "bcd":
        assert (tmp_path / name / "NOTICE").exists(), name
    convert(tmp_path / "d", tmp_path / "e", "--gemma_terms", "no")
    assert not (tmp_path / "e" / "NOTICE").exists()


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("format", ["huggingface", "flax", "run"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any) -> None:
    source = write_huggingface(tmp_path / "source", MULTI_QUERY, random_tensors(MULTI_QUERY))
    gemma = Gemma.from_pretrained(source, mesh=ONE)
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
        with pytest.raises(UserError, match=naming(tmp_path / "out", "154.8 kB", "1 kB")):
            gemma.save_pretrained(tmp_path / "out", format=format)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "write_generation_config", full)
    with pytest.raises(UserError, match=naming(tmp_path / "out", "No space left on device")):
        gemma.save_pretrained(tmp_path / "out", format=format)
    assert left(tmp_path) == {"source"}


def test_an_interruption_leaves_nothing_and_what_is_there_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma = tiny_gemma()
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match=naming(tmp_path / "mine", "already")):
        gemma.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)  # where a folder of that name was made
    with pytest.raises(UserError, match=naming("s3://bucket/a", "directory")):
        gemma.save_pretrained("s3://bucket/a")
    with pytest.raises(UserError, match=naming(tmp_path, "already")):
        gemma.save_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    gemma.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "write_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gemma.save_pretrained(tmp_path / "new")
    assert left(tmp_path) == {"mine", "empty"}
    assert (tmp_path / "mine").read_text() == "precious"


def test_arrays_of_several_dtypes_keep_theirs_or_take_the_widest(tmp_path: Path) -> None:
    tensors = random_tensors(MULTI_QUERY, "bfloat16")
    norms = random_tensors(MULTI_QUERY, "float32", seed=1)
    tensors |= {name: x for name, x in norms.items() if "norm" in name}
    source = write_huggingface(tmp_path / "source", MULTI_QUERY, tensors)
    convert(source, tmp_path / "flax", "--format", "flax")
    convert(tmp_path / "flax", tmp_path / "again")
    assert numbers(tmp_path / "flax") == numbers(tmp_path / "again") == numbers(source)
    # transformers takes everything in this dtype.
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "float32"
    convert(source, tmp_path / "run", "--format", "run")
    convert(source, tmp_path / "wide", "--dtype", "float32")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "wide")


@pytest.mark.parametrize("form", ["huggingface", "flax", "run"])
def test_a_checkpoint_is_written_into_no_other_and_no_path_that_orbax_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    source = write_huggingface(tmp_path / "source", MULTI_QUERY, random_tensors(MULTI_QUERY))
    convert(source, tmp_path / "run", "--format", "run")
    convert(source, tmp_path / "flax", "--format", "flax")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    inside = ["run/checkpoints/421", "run/x", "run/checkpoints/0/y/z", "source/x", "flax/params/x"]
    for name in inside + ["a[b]c/d"] * (form != "huggingface"):
        assert main(["convert", str(source), str(tmp_path / name), "--format", form]) == 2, name
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    convert(source, tmp_path / "a[b]c" / "d") if form == "huggingface" else None


@pytest.mark.parametrize("form", ["huggingface", "flax", "run", "gguf"])
def test_a_limit_on_what_is_written_is_told(tmp_path: Path, form: str) -> None:
    """The limit of `ulimit -f` causes another error than a full disk does."""
    source = write_huggingface(tmp_path / "source", MULTI_QUERY, random_tensors(MULTI_QUERY))
    words = [sys.executable, "-m", "gemma_jax.cli", "convert", source, tmp_path / "out", "--format", form]
    line = "ulimit -f 1; exec " + " ".join(map(str, words))
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert re.search(naming("error: ", tmp_path / "out"), ended.stderr)  # orbax may warn after it
    assert "Traceback" not in ended.stderr and left(tmp_path) == {"source"}
