"""Finds the real TPU compiler: installed as a package, or by `make test` in a separate folder.

It is not installed in the environment itself, because every program would then try to use it unless
JAX_PLATFORMS=cpu is set.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_jax.planning.compiler import prepare
from gemma_jax.planning.topology import parse_topology

LIBRARY = Path(__file__).parents[2] / ".venv" / "libtpu" / "libtpu" / "libtpu.so"


@pytest.fixture(scope="session")
def tpu_compiler() -> Iterator[None]:
    """Makes the TPU compiler available, or skips the test."""
    given = os.environ.get("TPU_LIBRARY_PATH")
    if not given and importlib.util.find_spec("libtpu") is None:
        if not LIBRARY.exists():
            pytest.skip("the TPU compiler is not installed: make .venv/libtpu/installed")
        os.environ["TPU_LIBRARY_PATH"] = str(LIBRARY)
    prepare(parse_topology("v5e-1"))
    yield
    if not given:
        os.environ.pop("TPU_LIBRARY_PATH", None)
