"""Measures how many seconds saving a checkpoint takes, and how many of them are spent reading it back.

python benchmarks/save.py gemma_110m          # any preset; on CPU, into the temporary folder
"""

import sys
import tempfile
import time

from etils import epath

from gemma_jax.checkpoint import store as store_module
from gemma_jax.checkpoint.record import RunRecord
from gemma_jax.checkpoint.store import CheckpointStore
from gemma_jax.config import CheckpointConfig, MeshConfig, PretrainConfig, preset
from gemma_jax.sharding import make_mesh
from gemma_jax.training.objectives import pretraining
from gemma_jax.training.state import create_train_state


def main() -> None:
    """Saves one state four times and prints the times."""
    config = PretrainConfig(model=preset(sys.argv[1]))
    state = create_train_state(pretraining(config, make_mesh(MeshConfig(cpu_devices=1))), None)
    check, seconds = store_module.check_readable, 0.0

    def timed(folder: epath.Path) -> None:
        nonlocal seconds
        began = time.monotonic()
        check(folder)
        seconds = time.monotonic() - began

    store_module.check_readable = timed
    with (
        tempfile.TemporaryDirectory() as folder,
        CheckpointStore(folder, CheckpointConfig(keep_last=1)) as store,
    ):
        for step in range(1, 5):
            began = time.monotonic()
            store.save(RunRecord(step=step, rows_seen=0, config={}), state.parts)
            store.wait()
            whole = time.monotonic() - began
            print(f"save {whole:.2f} s, of which reading back {seconds:.3f} s, {seconds / whole:.1%}")


if __name__ == "__main__":
    main()
