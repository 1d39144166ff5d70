"""Untrusted directories: anything but a plain file of a plausible size is rejected at once."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_jax import Gemma
from gemma_jax.cli import main
from gemma_jax.config import MeshConfig
from gemma_jax.errors import UserError
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.sampling.text import Detokenizer
from gemma_jax.tokenizer import Tokenizer
from tests.pretrained.published import MULTI_QUERY, random_tensors, write_huggingface

CONFIG = MULTI_QUERY | {"vocab_size": 380}  # two more than the tokenizer has


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in three forms, with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tensors = random_tensors(CONFIG, "bfloat16")
    found = {
        shape: write_huggingface(root / shape, CONFIG, tensors, n) for shape, n in (("one", 1), ("two", 2))
    }
    texts = [f"{a} {b} {a * b}\n" for a in range(60) for b in range(60)]
    Tokenizer.train(texts, 378, found["one"] / "tokenizer.model")
    found["flax"] = root / "flax"
    for folder in (found["one"], found["two"]):
        (folder / "generation_config.json").write_text('{"eos_token_id": [1, 107, 379]}')
    assert main(["convert", str(found["one"]), str(found["flax"]), "--format", "flax"]) == 0
    return found


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


BAD: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "dead link": lambda path: path.symlink_to("nowhere"),
    "huge": sparse,
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
}
FILES = {
    "two": ("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
    "flax": (
        "config.json",
        "generation_config.json",
        "params/_METADATA",
        "params/manifest.ocdbt",
        "params/*/*",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("form", "name"), [(form, name) for form, names in FILES.items() for name in names])
def test_only_regular_files_are_read(
    tmp_path: Path, models: dict[str, Path], form: str, name: str, bad: str, capsys: Any
) -> None:
    folder = shutil.copytree(models[form], tmp_path / "model")
    path = next(path for path in sorted(folder.glob(name)) if path.is_file())
    path.unlink()
    BAD[bad](path)
    told = "git lfs pull" if bad == "pointer" else path.name
    if bad == "folder" and path.is_relative_to(folder / "params"):
        told = "Flax"  # what follows are orbax's own words
    assert main(["sample", str(folder), "--prompt", "1"]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_links_are_followed_to_files_but_not_to_folders(tmp_path: Path, models: dict[str, Path]) -> None:
    """The Hub's cache has nothing but links to ../../blobs; a link to a folder could lead orbax anywhere."""
    linked = tmp_path / "models--google--gemma-2b-it" / "snapshots" / "0123abc"
    linked.mkdir(parents=True)
    for path in models["one"].iterdir():
        (linked / path.name).symlink_to(path)
    (linked / "generation_config.json").unlink()
    found = open_checkpoint(linked)
    assert found.end_tokens() == (1, 107) and found.terms_source
    assert found.weights is not None and found.weights.get("embedding", None).shape == (380, 32)

    folder = shutil.copytree(models["flax"], tmp_path / "flax")
    (folder / "params" / "more").symlink_to(".")
    with pytest.raises(UserError, match=re.escape(str(folder / "params" / "more"))):
        open_checkpoint(folder)


def test_ids_beyond_the_tokenizer_have_no_text(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(CONFIG)
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:378], embedding[378] = 0, -embedding[379]  # one of the last two is always the likeliest
    folder = write_huggingface(tmp_path, CONFIG, tensors)
    shutil.copy(models["one"] / "tokenizer.model", folder)
    gemma = Gemma.from_pretrained(folder, mesh=MeshConfig(cpu_devices=1))
    [generation] = gemma.generate([[378]], max_new_tokens=12)
    assert {*generation.token_ids} <= {378, 379} and generation.text == ""
    assert "".join(gemma.stream([378], max_new_tokens=12, stop=("a",))) == ""
    # Such an id ends a character whose bytes are not all there.
    detokenizer, tokenizer = Detokenizer(gemma.tokenizer), gemma.tokenizer
    ids = [*tokenizer.encode("é"), *tokenizer.encode("1")]
    assert [detokenizer.add(id) for id in (ids[0], 379, *ids)] == ["", "\ufffd", "", "é", "1"]
    assert main(["verify", str(folder), "--mesh.cpu_devices", "1"]) == 0
    assert "2 ids" in capsys.readouterr().out
    smaller = write_huggingface(
        tmp_path / "370", CONFIG | {"vocab_size": 370}, random_tensors(CONFIG | {"vocab_size": 370})
    )
    shutil.copy(models["one"] / "tokenizer.model", smaller)
    assert main(["verify", str(smaller), "--mesh.cpu_devices", "1"]) == 1
    assert main(["sample", str(smaller), "--prompt", "1"]) == 2


def test_a_wrong_end_token_speaks_against_a_checkpoint(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(models["one"], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 380}')
    assert main(["verify", str(folder), "--mesh.cpu_devices", "1"]) == 1
    assert "380" in capsys.readouterr().out
