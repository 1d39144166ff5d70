"""Every path that a user writes may be the address of a bucket."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from etils import epath

from gemma_jax.cli import main
from gemma_jax.config import replace, to_json
from gemma_jax.errors import UserError
from gemma_jax.paths import SMALL_FILE, children, read_bytes, read_json, user_path
from gemma_jax.tokenizer import Tokenizer
from tests.messages import naming
from tests.tiny_run import config, write_corpus


def test_a_path_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(user_path("~/runs/a")) == "/home/somebody/runs/a"
    assert str(user_path(Path("a b"))) == "a b"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3://bucket/a", naming("s3://bucket/a", "s3fs", "gemma_jax[data]")),
        ("gs://bucket/a", naming("gs://bucket/a", "gcsfs", "gemma_jax[data]")),
        ("http://host/a", naming("http://host/a", "gs://", "s3://")),
    ],
)
def test_an_address_that_cannot_be_reached(
    address: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def get_filesystem_class(scheme: str) -> None:
        raise ImportError({"s3": "Install s3fs to access S3", "gs": "Please install gcsfs"}[scheme])

    monkeypatch.setattr("fsspec.get_filesystem_class", get_filesystem_class)
    with pytest.raises(UserError, match=told):
        user_path(address)
    commands = [
        ["pretrain", address],
        ["pretrain", "demo", "--run_dir", "/nowhere/a", "--data.sources", f"{address}/*.txt"],
        ["pretrain", "demo", "--run_dir", "/nowhere/a", "--tokenizer.path", address],
        ["sample", address, "--prompt", "a"],
        ["inspect", address],
    ]
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2, command
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and address in last, (command, last)


def test_what_others_write_into_a_bucket_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our settings, fsspec would cache the listing of a folder for ever."""

    class FileSystem(fsspec.AbstractFileSystem):
        protocol = ("s3", "s3a")
        cachable = False

    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: FileSystem)
    user_path("s3://bucket/a")
    assert not FileSystem().dircache.use_listings_cache


@pytest.fixture
def run(bucket: epath.Path) -> epath.Path:
    """A run in a bucket that has its files, but no checkpoint: those go by another library's way."""
    write_corpus(bucket / "corpus")
    texts = (path.read_text() for path in (bucket / "corpus").glob("*.txt"))
    Tokenizer.train(texts, 430, "gs://bucket/small.model")
    changes = {"steps": 4, "tokenizer.path": "gs://bucket/small.model", "data.held_out": 0.0}
    changes |= {"evaluation.every": 0, "checkpoint.every": 100}
    run_config = config("gs://bucket/runs/a", "gs://bucket/corpus", "gs://bucket/cache")
    path = bucket / "runs" / "a"
    path.mkdir(parents=True)
    (path / "config.json").write_text(to_json(replace(run_config, changes)))
    return path


def test_a_run_in_a_bucket_is_trained_listed_drawn_inspected_and_replayed(
    run: epath.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemma_jax.checkpoint.store import CheckpointStore

    saved: list[int] = []
    monkeypatch.setattr(
        CheckpointStore, "save", lambda self, position, *rest, **more: saved.append(position.step)
    )
    assert main(["pretrain", str(run)]) == 0
    assert saved == [4]
    names = sorted(path.name for path in run.iterdir())
    assert names == [
        "checkpoints",
        "config.json",
        "data.json",
        "loss.png",
        "metrics.jsonl",
        "tokenizer.model",
    ]
    assert list(epath.Path("gs://bucket/cache/tokens").glob("*/*.json"))
    capsys.readouterr()
    assert main(["runs", "gs://bucket/runs", "--plot", "gs://bucket/curves.png"]) == 0
    assert "4/4" in capsys.readouterr().out
    assert epath.Path("gs://bucket/curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(run)]) == 0
    assert "blocks.attention.q" in capsys.readouterr().out
    assert main(["replay", str(run), "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[0])
    assert summary["loss"] == pytest.approx(summary["logged"]["loss"], rel=1e-6)
    assert not Path("gs:").exists()
    assert main(["sample", str(run), "--prompt", "alpha"]) == 2
    assert str(run) in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", ["pipe", "device", "folder", "dead link", "missing", "large", "no UTF-8", "deep", "twice"]
)
def test_what_is_no_small_text_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    make: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "dead link": lambda: path.symlink_to("nowhere"),
        "missing": lambda: None,
        "large": lambda: path.write_bytes(b"1" * (SMALL_FILE + 1)),
        "no UTF-8": lambda: path.write_bytes(b'"\xff"'),
        "deep": lambda: path.write_text("[" * 100_000),
        "twice": lambda: path.write_text('{"a": 1, "a": 2}'),
    }
    make[kind]()
    read = read_json if kind in ("no UTF-8", "deep", "twice") else read_bytes
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} "):
        read(path)


def test_a_folder_that_cannot_be_read_is_named_and_no_name_is_left_out(tmp_path: Path) -> None:
    for name in ("b", "a~", ".c"):
        (tmp_path / name).touch()
    assert [child.name for child in children(epath.Path(tmp_path))] == [".c", "a~", "b"]
    assert children(epath.Path(tmp_path / "nothing")) == []
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "b"))):
        children(epath.Path(tmp_path / "b"))
