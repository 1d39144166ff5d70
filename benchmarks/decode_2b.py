"""Measures how fast a 2B with random weights decodes on CPU, one row at a time, and llama.cpp beside it.

Both run in turn in one process with the same number of threads, each with its own form of the same weights:
bfloat16, int8 (q8_0) and int4 (q4_0). llama.cpp is the package xllamacpp, as `make parity` installs it.
Prints a JSON line with the medians of the rounds and their ratio. Tokens a second are those after the first
token; each prompt takes `prefill` seconds.

    .venv-parity/bin/python benchmarks/decode_2b.py [--kinds bfloat16 int8 int4] [--rounds 5] [--new 32]
        [--threads 2] [--preset gemma_2b] [--batches 1] [--prompt 64]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from train_step import use_threads

Speeds = dict[str, float]


def ours(gemma: Any, batch: int, prompt: int, new: int) -> Speeds:
    """Decodes with gemma_jax."""
    from gemma_jax.config import SamplingConfig
    from gemma_jax.sampling import Completion, complete_requests
    from gemma_jax.sampling.requests import requests_of

    rng = np.random.default_rng(0)
    prompts = [[2, *rng.integers(200, 300, prompt - 1).tolist()] for _ in range(batch)]
    requests = requests_of(prompts, SamplingConfig(max_new_tokens=new), [])
    completions = [Completion() for _ in requests]
    start = first = time.perf_counter()
    for _ in complete_requests(gemma._generator, requests, completions, watched=True):
        if first == start and completions[0].token_ids:
            first = time.perf_counter()
            had = len(completions[0].token_ids)
    seconds = time.perf_counter() - first
    return {"prefill": first - start, "tokens_per_second": batch * (new - had) / seconds}


def theirs(path: Path, threads: int, length: int) -> Callable[[int], Speeds]:
    """Returns a function that decodes with llama.cpp."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(path), length + 192, 1
    parameters.warmup, parameters.verbosity = False, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)

    def run(new: int) -> Speeds:
        prompt = [2, *np.random.default_rng(time.monotonic_ns()).integers(200, 300, length - 1).tolist()]
        request = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        answers: list[Any] = []
        server.handle_completions(request | {"timings_per_token": True}, answers.append)
        answer = answers[0] if isinstance(answers[0], dict) else json.loads(answers[0])
        timings = answer["timings"]
        return {"prefill": timings["prompt_ms"] / 1000, "tokens_per_second": timings["predicted_per_second"]}

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("threads", 2), ("rounds", 5), ("new", 32), ("prompt", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--preset", default="gemma_2b")
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "int8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    arguments = parser.parse_args()
    use_threads(arguments.threads)

    from gemma_jax import Gemma
    from gemma_jax.config import MeshConfig
    from gemma_jax.tokenizer import Tokenizer

    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            texts = [f"{a} and {b} are {a + b}\n" for a in range(40) for b in range(40)]
            tokenizer = Tokenizer.train(texts, 390, Path(folder) / "tokenizer.model")
            quantization = "" if kind == "bfloat16" else kind
            one = MeshConfig(cpu_devices=1)
            name = f"random:{arguments.preset}"
            gemma = Gemma.from_pretrained(name, mesh=one, dtype="bfloat16")
            target = Path(folder) / "gguf"
            whole = Gemma(gemma.spec, gemma.params, tokenizer)
            whole.save_pretrained(target, format="gguf", quantization=quantization)
            if quantization:
                del whole, gemma
                gemma = Gemma.from_pretrained(name, mesh=one, quantization=quantization)
            peer = theirs(next(target.glob("*.gguf")), arguments.threads, arguments.prompt)
            for batch in arguments.batches:
                ours(gemma, batch, arguments.prompt, arguments.new)  # compiles
                rounds: dict[str, list[Speeds]] = {"gemma_jax": [], "llama.cpp": []}
                for _ in range(arguments.rounds):
                    rounds["gemma_jax"].append(ours(gemma, batch, arguments.prompt, arguments.new))
                    rounds["llama.cpp"].append(peer(arguments.new))
                medians = {
                    program: {name: statistics.median(r[name] for r in found) for name in found[0]}
                    for program, found in rounds.items()
                }
                speeds = [medians[program]["tokens_per_second"] for program in rounds]
                line = {"kind": kind, "batch": batch, "ratio": speeds[0] / speeds[1]} | medians
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
