"""Measures a whole `sample.py`: seconds from its start to the first token, and its peak memory.

A generated directory of random weights in bfloat16 (2B: 5 GB) with a small tokenizer is sampled with a prompt
of 64 tokens, and llama.cpp (the package xllamacpp) reads a GGUF file of the same weights, in turn, each in a
process of its own. The first call, which compiles and brings the files into the page cache, does not count.
Prints a JSON line: medians of the seconds, and the largest resident memory (VmHWM) beside the weights' bytes.

    .venv-parity/bin/python benchmarks/first_token.py [--preset gemma_2b] [--rounds 5] [--folder FOLDER]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load_memory import RandomWeights

TOKENS = 64
THEIRS = """
import sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], 256, 1
parameters.warmup, parameters.verbosity = False, 0
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 2
prompt = [2, *range(200, 199 + int(sys.argv[2]))]
answers = []
request = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
xllamacpp.Server(parameters).handle_completions(request, answers.append)
assert answers
"""


def generate(folder: Path, preset: str) -> str:
    """Writes the weights in both forms, and returns a prompt of about TOKENS tokens."""
    import ml_dtypes
    import numpy as np

    from gemma_jax.config import PRESETS
    from gemma_jax.pretrained.export import export
    from gemma_jax.pretrained.layout import parameter_shapes
    from gemma_jax.tokenizer import Tokenizer

    config = PRESETS[preset]
    texts = [f"{a} and {b} are {a + b}\n" for a in range(40) for b in range(40)]
    tokenizer = Tokenizer.train(texts, 390, folder / "tokenizer.model")
    weights = RandomWeights(parameter_shapes(config), np.dtype(ml_dtypes.bfloat16))
    for form in ("huggingface", "gguf"):
        about = {"end_tokens": (1,), "tokenizer": tokenizer, "terms_source": ""}
        export(folder / form, form, weights, config, dtype="bfloat16", **about)
    prompt = ""
    while len(tokenizer.encode(prompt)) < TOKENS - 1:
        prompt += " and"
    return prompt


def run(command: list[str]) -> tuple[float, int]:
    """Returns the seconds of a command and its largest resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command[:2]} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma_2b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        prompt = generate(folder, arguments.preset)
        weights = sum(file.stat().st_size for file in (folder / "huggingface").glob("*.safetensors"))
        sample = Path(__file__).parents[1] / "sample.py"
        one = ["--max_new_tokens", "1", "--mesh.cpu_devices", "1"]
        commands = {
            "gemma_jax": [sys.executable, str(sample), str(folder / "huggingface"), "--prompt", prompt, *one],
            "llama.cpp": [sys.executable, "-c", THEIRS, str(next(folder.glob("gguf/*.gguf"))), str(TOKENS)],
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(1 + arguments.rounds):
            for name, command in commands.items():
                found[name].append(run(command))
        line: dict[str, object] = {"weights": weights}
        for name, runs in found.items():
            seconds, peaks = zip(*runs[1:], strict=True)
            line[name] = {"seconds": statistics.median(seconds), "peak": max(peaks)}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
