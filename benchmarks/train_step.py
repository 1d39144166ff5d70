"""Measures training speed of the 110M shape in float32, and that of transformers if it is installed.

With --lora RANK, adapters on all linear layers are trained, there by PEFT, and the second half of each row is
in the loss.

Both programs run alternately in one process, so that noise of the machine affects both alike; quote the
ratio. Prints one JSON line for each program, then one with the ratio. With --only, the line also has the
program's peak memory.

    python benchmarks/train_step.py [--threads 2] [--rounds 5] [--batch 4] [--length 512] [--only NAME]
        [--lora RANK]
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np

PRESET = "gemma_110m"


def ours(batch: int, length: int, lora: int) -> Callable[[], float]:
    """Returns a function that trains one step with gemma_jax and returns its loss."""
    from gemma_jax.config import (
        PRESETS,
        ComputeConfig,
        ExampleDataConfig,
        FinetuneConfig,
        LoraConfig,
        MeshConfig,
    )
    from gemma_jax.data.packing import Batch
    from gemma_jax.sharding import make_mesh, put_batch
    from gemma_jax.training.finetuning import finetuning
    from gemma_jax.training.objectives import pretraining
    from gemma_jax.training.state import create_train_state
    from gemma_jax.training.step import make_train_step
    from gemma_jax.weights import Dense

    config = FinetuneConfig(
        model=PRESETS[PRESET],
        data=ExampleDataConfig(sequence_length=length, batch_size=batch),
        lora=LoraConfig(rank=lora, alpha=16),
        compute=ComputeConfig(dtype="float32", loss_block=128, remat="products"),
    )
    mesh = make_mesh(MeshConfig(cpu_devices=1))
    recipe = finetuning(config, mesh, Dense, length // 2, 1) if lora else pretraining(config, mesh)
    state, step = create_train_state(recipe), make_train_step(recipe)
    rows = tokens(batch, length + 1)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)).copy()
    ones = np.ones((batch, length), np.int32)
    weights = ones.astype(np.float32)
    weights[:, : length // 2 if lora else 0] = 0
    rows = Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), weights, positions, ones)
    on_mesh = put_batch(rows, batch, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, on_mesh)
        return float(metrics["loss"])

    return run


def theirs(batch: int, length: int, lora: int) -> Callable[[], float]:
    """Returns the same function with transformers' GemmaForCausalLM and torch's fused AdamW."""
    import torch

    model = transformers_model()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=lora, lora_alpha=16, target_modules="all-linear"))
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = torch.from_numpy(tokens(batch, length).astype(np.int64))
    labels = rows.clone()
    labels[:, : length // 2 if lora else 0] = -100

    def run() -> float:
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return run


def transformers_model():
    """Returns a GemmaForCausalLM of the preset's shape with random weights."""
    from transformers import GemmaConfig, GemmaForCausalLM

    from gemma_jax.config import PRESETS

    shape = PRESETS[PRESET]
    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.embed_dim,
            intermediate_size=shape.hidden_dim,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.context_length,
        )
    )


def tokens(batch: int, length: int) -> np.ndarray:
    """Returns random ids, int32 [batch, length]."""
    return np.random.default_rng(0).integers(0, 32_000, (batch, length)).astype(np.int32)


def in_turn(programs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs the programs alternately. Returns for each program the seconds of each round.

    A round calls a program twice and times the second call. A program that frees its memory after each call
    gets it back quickly if it is called again at once, but only after seconds if another program has run
    meanwhile (benchmarks/LOG.md), which does not happen in real training.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            program()
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def use_threads(count: int) -> None:
    """Limits both programs to the first `count` cores. Call it before importing either."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("threads", 2), ("rounds", 5), ("batch", 4), ("length", 512), ("lora", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("gemma_jax", "transformers"))
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    makers = {"gemma_jax": ours}
    if importlib.util.find_spec("transformers"):
        makers["transformers"] = theirs
    if arguments.only:
        makers = {arguments.only: makers[arguments.only]}
    programs = {
        name: make(arguments.batch, arguments.length, arguments.lora) for name, make in makers.items()
    }
    seconds = in_turn(programs, arguments.rounds)
    speed = {name: arguments.batch * arguments.length / statistics.median(s) for name, s in seconds.items()}
    for name, value in speed.items():
        line = {"program": name, "tokens_per_second": round(value, 1), **vars(arguments)}
        if arguments.only:
            line["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        print(json.dumps(line))
    if len(speed) == 2:
        ratios = [b / a for a, b in zip(seconds["gemma_jax"], seconds["transformers"], strict=True)]
        print(json.dumps({"gemma_jax / transformers": round(statistics.median(ratios), 3)}))


if __name__ == "__main__":
    main()
