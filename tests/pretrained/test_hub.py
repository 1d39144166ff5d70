"""Names on the Hugging Face Hub and on Kaggle, tested against an emulated hub on this machine.

The real client accesses it from separate processes, because it reads its settings when it is imported.
"""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_jax.errors import UserError
from gemma_jax.pretrained.checkpoint import open_checkpoint
from gemma_jax.pretrained.hub import is_hub_name
from tests.messages import naming
from tests.pretrained.published import MULTI_QUERY, random_tensors, write_huggingface

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MORE = ("pytorch_model.bin", "gemma-2b.gguf", "README.md", "tokenizer.json", "onnx/model.onnx")


class Hub(http.server.BaseHTTPRequestHandler):
    """Emulates the parts of the Hub that its client uses."""

    folder: Path
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path} {self.headers.get('Authorization', '')}".strip())
        if path.startswith("/api/models/google/gemma-2b-it/tree/"):
            sizes = {name: (self.folder / name).stat().st_size for name in self._names()}
            self._json([{"type": "file", "path": name, "oid": name, "size": n} for name, n in sizes.items()])
        elif path.startswith("/api/models/google/gemma-2b-it"):
            siblings = [{"rfilename": name} for name in self._names()]
            self._json({"id": "google/gemma-2b-it", "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/google/gemma-2b-it/resolve/"):
            name = path.split("/resolve/")[1].split("/", 1)[1]
            self._answer(200, (self.folder / name).read_bytes(), ETag=f'"{name}"')
        elif "gated" in path:
            self._answer(403, b"{}", **{"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
        elif "busy" in path:
            self._answer(500, b"{}")
        else:
            self._answer(404, b"{}", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"})

    def _names(self) -> list[str]:
        return [p.relative_to(self.folder).as_posix() for p in sorted(self.folder.rglob("*")) if p.is_file()]

    def _json(self, data: object) -> None:
        self._answer(200, json.dumps(data).encode(), **{"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a hub that has google/gemma-2b-it, of tiny shape."""
    Hub.folder, Hub.asked = tmp_path_factory.mktemp("hub"), []
    write_huggingface(Hub.folder, MULTI_QUERY, random_tensors(MULTI_QUERY), 2)
    for name in MORE:
        (Hub.folder / name).parent.mkdir(exist_ok=True)
        (Hub.folder / name).write_text("not needed")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def download(name: str, cache: Path, endpoint: str, **environment: str) -> tuple[Path | None, str]:
    """Returns the directory or the error message, and what the client printed."""
    program = (
        "import sys; from gemma_jax.errors import UserError; from gemma_jax.pretrained import hub\n"
        "hub.SECONDS = 2\n"
        "try: print(hub.download(sys.argv[1]))\n"
        "except UserError as error: print('told:', error)\n"
    )
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        env={**clean, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    return (None, last) if last.startswith("told:") else (Path(last), done.stderr)


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that accepts, and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


def test_only_what_is_needed_is_downloaded_once_and_then_found_offline(hub: str, tmp_path: Path) -> None:
    folder, shown = download("google/gemma-2b-it", tmp_path, hub, HF_TOKEN="hf_secret")
    assert folder is not None, shown
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert "%" in shown  # progress
    assert any("Bearer hf_secret" in request for request in Hub.asked)
    found = open_checkpoint(folder)
    assert found.config.embed_dim == MULTI_QUERY["hidden_size"]
    before = len(Hub.asked)
    again, _ = download("google/gemma-2b-it", tmp_path, hub, HF_HUB_OFFLINE="1")
    assert again == folder and len(Hub.asked) == before
    with silent_server() as address:
        again, _ = download("google/gemma-2b-it", tmp_path, address)
        assert again == folder
        nothing, shown = download("google/gemma-2b-it", tmp_path / "empty", address)
        assert nothing is None and "google/gemma-2b-it" in shown and "local directory" in shown


@pytest.mark.parametrize(("name", "environment", "told"), [
    ("google/gemma-gated", {}, "https://huggingface.co/google/gemma-gated,"),
    ("google/gemma-3b", {}, "private"),
    ("google/busy", {}, "local directory"),
])  # fmt: skip
def test_each_failure_says_what_to_do(
    hub: str, tmp_path: Path, name: str, environment: dict[str, str], told: str
) -> None:
    folder, shown = download(name, tmp_path, hub, **environment)
    assert folder is None and told in shown and name in shown


def test_names_of_a_hub_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("google/gemma-2b", "google/codegemma-7b-it@main", "google/gemma/Flax/2b-it/2"):
        assert is_hub_name(name), name
    for name in ("gemma-2b", "/google/gemma", "../google/gemma", "a/b/c", "~/gemma", "google/gemma/keras/2b"):
        assert not is_hub_name(name), name
    # A mistyped run is a run, where its folder is there.
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("runs/dmeo")
    with pytest.raises(UserError, match=naming("runs/dmeo", "random:PRESET")):
        open_checkpoint("runs/dmeo")


def test_weights_of_google_are_under_its_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_huggingface(tmp_path, MULTI_QUERY, random_tensors(MULTI_QUERY))
    monkeypatch.setattr("gemma_jax.pretrained.checkpoint.download", lambda name: folder)
    assert open_checkpoint("google/gemma-2b").terms_source == "google/gemma-2b"
    assert open_checkpoint("somebody/from-scratch").terms_source == ""
    assert open_checkpoint(folder).terms_source == ""
