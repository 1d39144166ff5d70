"""Measures what each kind of quantised weights costs, and llama.cpp's beside: bytes, errors, agreement.

The error is the root mean square difference of all log-probabilities from those of the original weights,
after prompts cut from a text. llama.cpp (the package xllamacpp, as `make parity` installs it) computes its
own from GGUF files of the same weights. Prints one JSON line for each path.

    .venv-parity/bin/python benchmarks/quantisation.py RUN --text FILE [--prompts 24]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("int8", "int8:32", "int4", "int4:64", "int4:channel", "nf4")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def llama_cpp(path: Path, prompts: list[list[int]], vocabulary: int) -> np.ndarray:
    """Log-probabilities [prompts, vocabulary] of the next token, as llama.cpp computes them."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(path), 512, 1
    parameters.warmup, parameters.verbosity = False, 0
    server = xllamacpp.Server(parameters)
    rows = np.full((len(prompts), vocabulary), np.nan)
    for row, prompt in zip(rows, prompts, strict=True):
        answers: list[Any] = []
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": vocabulary, "temperature": 0}
        server.handle_completions(request, answers.append)
        answer = answers[0] if isinstance(answers[0], dict) else json.loads(answers[0])
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    return rows


def sampled(gemma: Any, prompts: list[list[int]]) -> np.ndarray:
    """The same as sampling computes them: few rows by the kernels for CPU, with activations in integers."""
    import jax
    import jax.numpy as jnp

    from gemma_jax.sampling.decode import prefill
    from gemma_jax.weights import Context

    @jax.jit
    def last(params: Any, tokens: jax.Array) -> jax.Array:
        model, lengths = gemma.spec.merge(params), jnp.full(len(tokens), tokens.shape[1])
        read = prefill(model, tokens, 0, lengths, jnp.zeros_like(lengths), size=tokens.shape[1])
        return model.logits(read.newest, Context(sampling=True))[..., : gemma.config.vocab_size]

    return log_softmax(np.concatenate([last(gemma.params, np.asarray([prompt])) for prompt in prompts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--length", type=int, default=64, help="tokens of each prompt; the kernels take 64")
    arguments = parser.parse_args()

    import jax

    from gemma_jax import Gemma
    from gemma_jax.config import MeshConfig
    from gemma_jax.memory import stored_bytes

    one = MeshConfig(cpu_devices=1)
    original = Gemma.from_pretrained(arguments.checkpoint, mesh=one)
    ids = original.tokenizer.encode_typed(arguments.text.read_text())
    size = arguments.length - 1
    prompts = [[2, *ids[i * size : (i + 1) * size]] for i in range(arguments.prompts)]
    expected = log_softmax(original.logits(prompts)[:, -1])

    def report(path: str, found: np.ndarray, size: int) -> None:
        gap = found - expected
        line = {"path": path, "bytes": size, "rms": float(np.sqrt(np.nanmean(gap**2)))}
        line |= {"largest": float(np.nanmax(np.abs(gap))), "tokens": int(np.isfinite(gap).sum())}
        line |= {"agreement": float(np.mean(np.nanargmax(found, -1) == expected.argmax(-1)))}
        print(json.dumps(line), flush=True)

    for kind in KINDS:
        gemma = Gemma.from_pretrained(arguments.checkpoint, mesh=one, quantization=kind)
        held = sum(stored_bytes(x.shape, x.dtype) for x in jax.tree.leaves(gemma.params))
        report(kind, log_softmax(gemma.logits(prompts)[:, -1]), held)
        report(f"{kind} sampled", sampled(gemma, prompts), held)
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in {"bf16": "", "q8_0": "int8", "q4_0": "int4"}.items():
            target = Path(folder) / name
            original.save_pretrained(target, format="gguf", quantization=kind)
            file = target / "model.gguf"
            report(f"llama.cpp {name}", llama_cpp(file, prompts, expected.shape[1]), file.stat().st_size)
            gemma = Gemma.from_pretrained(target, mesh=one)
            report(f"{name} read here", log_softmax(gemma.logits(prompts)[:, -1]), file.stat().st_size)


if __name__ == "__main__":
    main()
