"""Paths that are not a checkpoint, or are one in an unusual form."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import MeshConfig
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming
from tests.pretrained.published import MULTI_QUERY, random_tensors, write_huggingface

ONE = MeshConfig(cpu_devices=1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_huggingface(tmp_path / "model", MULTI_QUERY, random_tensors(MULTI_QUERY))


def refusal(capsys: pytest.CaptureFixture[str], name: object) -> str:
    """Checks that a checkpoint is rejected, and returns the message."""
    capsys.readouterr()
    assert main(["convert", str(name), f"{name}-out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not os.path.exists(f"{name}-out")
    return line


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "dead link": lambda path: path.symlink_to("nowhere"),
    "pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
    ),
    "noise": lambda path: path.write_bytes(b"\xff\x00" * 100),
    "nested": lambda path: path.write_text("[" * 10**5),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.model"]
)
def test_files_that_are_none_are_refused_at_once(
    directory: Path, capsys: pytest.CaptureFixture[str], kind: str, file: str
) -> None:
    (directory / file).unlink(missing_ok=True)
    SPECIAL[kind](directory / file)
    assert file in refusal(capsys, directory)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_an_orbax_directory_with_special_files_is_refused(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert main(["convert", str(directory), str(tmp_path / "flax"), "--format", "flax"]) == 0
    files = [path for path in (tmp_path / "flax" / "params").rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        path.unlink()
        SPECIAL[kind](path)
        assert path.name in refusal(capsys, tmp_path / "flax")
        path.unlink()
        path.write_bytes(content)
    open_checkpoint(tmp_path / "flax")


def test_a_file_an_adapter_and_a_dead_link_are_named_for_what_they_are(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = directory / "model.safetensors"
    assert re.search(naming(file, directory), refusal(capsys, file))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/gemma-2b"}))
    shutil.copy(directory / "model.safetensors", adapter / "adapter_model.safetensors")
    message = refusal(capsys, adapter)
    assert "adapter" in message and "google/gemma-2b" in message
    for name in ("pipe", "dead link"):
        SPECIAL[name](tmp_path / name)
        assert re.search(naming(tmp_path / name, "directory"), refusal(capsys, tmp_path / name))


def test_names_without_a_prefix_are_those_of_a_model_without_its_head(
    tmp_path: Path, directory: Path
) -> None:
    bare = {name.removeprefix("model."): x for name, x in random_tensors(MULTI_QUERY).items()}
    for shards in (1, 3):
        other = write_huggingface(tmp_path / f"bare{shards}", MULTI_QUERY, bare, shards)
        tokens = [[1, 5, 9]]
        np.testing.assert_array_equal(
            Gemma.from_pretrained(other, mesh=ONE).logits(tokens),
            Gemma.from_pretrained(directory, mesh=ONE).logits(tokens),
        )


def test_added_rows_of_the_embedding_have_no_text(
    tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.load(tiny_run / "tokenizer.model")
    config = MULTI_QUERY | {"vocab_size": tokenizer.vocab_size + 3}
    tensors = random_tensors(config)
    # Nothing but the last of the added rows is ever likely.
    tensors["model.embed_tokens.weight"][-1] *= 1000
    tensors["model.embed_tokens.weight"][:-1] = abs(tensors["model.embed_tokens.weight"][:-1]) * 1e-3
    folder = write_huggingface(tmp_path / "added", config, tensors)
    tokenizer.save(folder / "tokenizer.model")
    gemma = Gemma.from_pretrained(folder, mesh=ONE)
    last = config["vocab_size"] - 1
    (generation,) = gemma.generate([[2, last]], max_new_tokens=4)
    assert last in generation.token_ids and "".join(generation.text.split()) == generation.text.strip()
    assert main(["verify", str(folder), "--mesh.cpu_devices", "1"]) == 0
    assert "3 ids" in capsys.readouterr().out


def test_what_ends_an_answer_stands_in_config_json_too_and_is_in_the_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(MULTI_QUERY)
    most = MULTI_QUERY["vocab_size"] - 1
    folder = write_huggingface(tmp_path / "model", MULTI_QUERY | {"eos_token_id": [1, most]}, tensors)
    assert open_checkpoint(folder).end_tokens() == (1, most)
    (folder / "generation_config.json").write_text('{"eos_token_id": 99999999}')
    assert "99999999" in refusal(capsys, folder)
    snapshot = tmp_path / "models--google--gemma-2b-it" / "snapshots" / "0123"
    config = MULTI_QUERY | {"vocab_size": 128}
    write_huggingface(snapshot, config, random_tensors(config))
    assert open_checkpoint(snapshot).end_tokens() == (1, 107)
