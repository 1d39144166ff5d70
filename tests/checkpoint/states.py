"""Train states to save in tests, and functions to compare what is restored."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.checkpoint.record import RunRecord
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import PRESETS, CheckpointConfig, PretrainConfig, to_dict
from gemma_jax.sharding import named_arrays
from gemma_jax.testing import cpu_mesh
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import TrainState, create_train_state

CONFIG = PretrainConfig(model=PRESETS["gemma_tiny"])
CONFIG_AS_JSON = json.loads(json.dumps(to_dict(CONFIG)))
KEEP_ALL = CheckpointConfig(keep_last=100)
# One array in each part.
PARTS = {"params": {"w": jnp.arange(1.0, 9.0)}, "opt_state": {"count": jnp.int32(3)}}
Bits = dict[str, bytes]


def random_state(seed: int) -> TrainState:
    """Returns a train state without constant arrays, because arrays of zeros would not be written at all."""
    state = create_train_state(pretraining(CONFIG, cpu_mesh(8, fsdp=4, tensor=2)))
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def fill(x: jax.Array) -> jax.Array:
        values = jax.random.normal(next(keys), x.shape) if x.dtype == jnp.float32 else x + seed
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return dataclasses.replace(
        state, trainable=jax.tree.map(fill, state.trainable), opt_state=jax.tree.map(fill, state.opt_state)
    )


def bits(parts: dict[str, Any]) -> Bits:
    return {name: np.asarray(x).tobytes() for name, x in named_arrays(parts).items()}


def position(step: int, **more: Any) -> RunRecord:
    return RunRecord(**{"step": step, "rows_seen": step * 8, "config": to_dict(CONFIG)} | more)


def save(store: CheckpointStore, step: int, state: TrainState) -> None:
    store.save(position(step), state.parts)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def wait_for_writers() -> None:
    """Waits for threads of orbax that keep writing after a save has failed.

    In a real run, they end together with the process.
    """
    for thread in threading.enumerate():
        if thread.name.startswith("asyncio_"):
            thread.join(30)
