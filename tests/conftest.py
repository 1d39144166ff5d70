"""Every test sees eight CPU devices."""

import os
from pathlib import Path

import pytest

from gemma_jax.testing import use_cpu_devices

use_cpu_devices(8)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real test material, which is not part of this repository."""
    folder = Path(os.environ.get("GEMMA_JAX_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real test material: set GEMMA_JAX_TEST_DATA to its folder")
    return folder
