"""Measures greedy decoding speed of the 110M shape in float32, and that of transformers if it is installed.

The programs run alternately in one process; quote the ratios. `streamed` is gemma_jax with somebody watching,
who gets the tokens every few hundredths of a second. Prints one JSON line for each program and batch size,
then one with the ratios. The time is that of a whole call: prefill and every new token.

    python benchmarks/decode.py [--threads 2] [--rounds 5] [--batches 1 8] [--prompt 64] [--new 128]
        [--unroll 1] [--preset gemma_110m]
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
from train_step import PRESET, in_turn, tokens, transformers_model, use_threads


def ours(preset: str, unroll: int) -> Callable[[np.ndarray, int, bool], None]:
    """Returns a function that decodes with gemma_jax: prompts [B, P], a number of new tokens, and whether to
    stream them."""
    from gemma_jax import Gemma
    from gemma_jax.config import ComputeConfig, MeshConfig, SamplingConfig
    from gemma_jax.sampling import Completion, complete_requests
    from gemma_jax.sampling.requests import requests_of

    compute = ComputeConfig(dtype="float32", scan_unroll=unroll)
    gemma = Gemma.from_pretrained(f"random:{preset}", mesh=MeshConfig(cpu_devices=1), compute=compute)

    def run(prompts: np.ndarray, new: int, streamed: bool) -> None:
        # There are no stop tokens, so each row generates all its new tokens, as with transformers.
        requests = requests_of(prompts.tolist(), SamplingConfig(max_new_tokens=new), [])
        completions = [Completion() for _ in requests]
        for _ in complete_requests(gemma._generator, requests, completions, watched=streamed):
            pass
        assert all(len(completion.token_ids) == new for completion in completions)

    return run


def theirs() -> Callable[[np.ndarray, int], None]:
    """Returns the same function with transformers."""
    import torch

    model = transformers_model().eval()

    def run(prompts: np.ndarray, new: int) -> None:
        ids = torch.from_numpy(prompts.astype(np.int64))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
        )
        assert out.shape[1] == ids.shape[1] + new

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("threads", 2), ("rounds", 5), ("prompt", 64), ("new", 128), ("unroll", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--preset", default=PRESET, help="transformers runs beside the default only")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    from gemma_jax.config import PRESETS

    decode = ours(arguments.preset, arguments.unroll)
    programs: dict[str, Callable[[np.ndarray, int], None]] = {
        "gemma_jax": partial(decode, streamed=False),
        "streamed": partial(decode, streamed=True),
    }
    if arguments.preset == PRESET and importlib.util.find_spec("transformers"):
        programs["transformers"] = theirs()
    for batch in arguments.batches:
        prompts = tokens(batch, arguments.prompt) % PRESETS[arguments.preset].vocab_size
        calls = {name: partial(program, prompts, arguments.new) for name, program in programs.items()}
        seconds = in_turn(calls, arguments.rounds)
        for name, s in seconds.items():
            speed = batch * arguments.new / statistics.median(s)
            print(json.dumps({"program": name, "batch": batch, "tokens_per_second": round(speed, 1)}))
        own, *others = seconds
        ratios = {
            f"{own} / {name}": statistics.median(
                b / a for a, b in zip(seconds[own], seconds[name], strict=True)
            )
            for name in others
        }
        print(json.dumps({"batch": batch} | {name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
