"""Measures peak memory of loading published weights, from a generated directory of random weights (2B: 5 GB).

Each load runs in a separate process, which samples its resident anonymous memory (RssAnon of
/proc/self/status, which excludes pages of the mapped file). Prints one JSON line per mesh: the bytes of the
parameters, of the file's largest tensor, at the peak, and on each device at the end. The project's bound on
one CPU device is 1.15 times the parameters plus the largest tensor.

    python benchmarks/load_memory.py [--preset gemma_2b] [--dtype bfloat16] [--form huggingface|flax]
        [--quantization '' int8 int4 nf4] [--devices 1 8] [--folder /tmp/gemma_jax_load] [--keep]
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np


class RandomWeights:
    """Random weights in the shapes of a model: one block of random numbers, repeated."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> None:
        self._shapes, self._dtype = shapes, dtype
        self._block = np.random.default_rng(0).normal(size=2**20).astype(dtype) / 64

    def get(self, parameter: str, layer: int | None) -> np.ndarray:
        return np.resize(self._block, self._shapes[parameter])

    def where(self, parameter: str, layer: int | None) -> str:
        return parameter


def generate(folder: Path, preset: str, form: str) -> None:
    """Writes the directory in bfloat16, the dtype in which Google published the models."""
    import ml_dtypes

    from gemma_jax.config import PRESETS
    from gemma_jax.pretrained.export import export
    from gemma_jax.pretrained.layout import parameter_shapes

    config = PRESETS[preset]
    weights = RandomWeights(parameter_shapes(config), np.dtype(ml_dtypes.bfloat16))
    export(folder, form, weights, config, dtype="bfloat16", end_tokens=(1,), tokenizer=None, terms_source="")


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def measure(folder: Path, devices: int, dtype: str, quantization: str) -> dict[str, object]:
    """Loads the weights in this process, and returns the measurements."""
    import jax

    from gemma_jax.config import ComputeConfig, MeshConfig
    from gemma_jax.memory import stored_bytes
    from gemma_jax.model import ModelSpec
    from gemma_jax.pretrained.checkpoint import open_checkpoint
    from gemma_jax.pretrained.layout import parameter_shapes
    from gemma_jax.sharding import make_mesh

    mesh = make_mesh(MeshConfig(cpu_devices=devices))
    jax.block_until_ready(jax.numpy.zeros(()))
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    found = open_checkpoint(folder)
    spec = ModelSpec(found.config, ComputeConfig(param_dtype=dtype), mesh, found.kind(quantization))
    params = jax.block_until_ready(found.params(spec))
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(params)
    weights = sum(stored_bytes(x.shape, x.dtype) for x in leaves)
    largest = 2 * max(int(np.prod(shape)) for shape in parameter_shapes(found.config).values())
    held = {device.id: 0 for device in mesh.devices.flat}
    for x in leaves:
        for shard in x.addressable_shards:
            held[shard.device.id] += stored_bytes(shard.data.shape, x.dtype)
    return {
        "devices": devices,
        "quantization": quantization,
        "weights": weights,
        "largest_tensor_of_the_file": largest,
        "peak": peak - before,
        "peak_rss_anon_gib": round(peak / 2**30, 2),
        "bound": int(1.15 * weights + largest),
        "peak_over_weights": round((peak - before) / weights, 3),
        "bytes_a_device": sorted(set(held.values())),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma_2b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--form", default="huggingface", choices=["huggingface", "flax"])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--quantization", nargs="+", default=[""], help="'' int8 int4 nf4: one load of each")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gemma_jax_load"))
    parser.add_argument("--keep", action="store_true", help="leave the generated directory for another run")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind = arguments.quantization[0]
        print(json.dumps(measure(arguments.folder, arguments.measure, arguments.dtype, kind)))
        return
    if not arguments.folder.exists():
        generate(arguments.folder, arguments.preset, arguments.form)
    try:
        for devices, kind in itertools.product(arguments.devices, arguments.quantization):
            options = ["--folder", str(arguments.folder), "--dtype", arguments.dtype, "--quantization", kind]
            subprocess.run([sys.executable, __file__, *options, "--measure", str(devices)], check=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
