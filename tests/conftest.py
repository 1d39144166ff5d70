"""Fixtures that tests share, and settings: every test runs with eight CPU devices."""

import os
from pathlib import Path

import fsspec
import jax
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from gemma_jax.cli import main
from gemma_jax.testing import use_cpu_devices
from tests.tiny_run import config_file, write_corpus


def pytest_configure(config: pytest.Config) -> None:
    """Sets what jax reads when it starts: eight CPU devices, and how programs are compiled.

    Most of the suite's time is compiling. Many tests compile the same programs, and LLVM's
    optimisations take more time than they save. Tests marked slow measure programs, so they optimise them.
    """
    if config.option.markexpr != "slow":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    use_cpu_devices(8)
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real test data, which is not part of this repository."""
    folder = Path(os.environ.get("GEMMA_JAX_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real test material: set GEMMA_JAX_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents of the tiny run, to be read only; caches are beside the folder."""
    folder = tmp_path_factory.mktemp("tiny") / "corpus"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(corpus: Path) -> Path:
    """A run of 8 steps with checkpoints after 4 and 8, to be read only; its config file is beside it."""
    assert main(["pretrain", config_file(corpus.parent, corpus)]) == 0
    return corpus.parent / "run"


class Bucket(MemoryFileSystem):  # fsspec has no types
    """A file system that serves gs:// from memory."""

    protocol = ("gs", "gcs")
    cachable = False
    store: dict[str, object] = {}
    pseudo_dirs: list[str] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """An empty gs://bucket in memory, which replaces Google's service."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    filesystem = Bucket()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: filesystem)
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: Bucket)
    path = epath.Path("gs://bucket")
    path.mkdir(parents=True)
    return path
