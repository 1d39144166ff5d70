"""The real TPU compiler, where it is installed: as a package, or by `make test` in a folder of its own.

In the environment itself it would be tried by every program that does not say JAX_PLATFORMS=cpu.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_jax.planning.compiler import prepare

LIBRARY = Path(__file__).parents[2] / ".venv" / "libtpu" / "libtpu" / "libtpu.so"


@pytest.fixture(scope="session")
def tpu_compiler() -> Iterator[None]:
    """For tests that compile for TPUs."""
    given = os.environ.get("TPU_LIBRARY_PATH")
    if not given and importlib.util.find_spec("libtpu") is None:
        if not LIBRARY.exists():
            pytest.skip("the TPU compiler is not installed: make .venv/libtpu/installed")
        os.environ["TPU_LIBRARY_PATH"] = str(LIBRARY)
    prepare()
    yield
    if not given:
        os.environ.pop("TPU_LIBRARY_PATH", None)
