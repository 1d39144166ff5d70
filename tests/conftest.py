"""Every test sees eight CPU devices."""

import os
from pathlib import Path

import jax
import pytest

from gemma_jax.testing import use_cpu_devices

use_cpu_devices(8)

# Most of the suite's time is compiling, and many tests compile the same programs.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real test material, which is not part of this repository."""
    folder = Path(os.environ.get("GEMMA_JAX_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real test material: set GEMMA_JAX_TEST_DATA to its folder")
    return folder
