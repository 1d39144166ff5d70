"""Measures the overhead of the training loop: the demo's step in the loop against the compiled step alone.

Both run alternately, a few steps each, on the same state, and the order changes from round to round. Alone,
the step uses one batch that is already on the devices, and fetches nothing before the last step. The loop
reads batches and puts them on the devices, fetches each step's metrics and writes the log. Prints one JSON
line; quote the overhead.

    python benchmarks/loop_overhead.py [--rounds 8] [--steps 20]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


class NoCheckpoints:
    """Replaces the checkpoint store, so that a round of the loop saves nothing at its end."""

    def save(self, *arguments: Any, **named: Any) -> None:
        pass

    def wait(self) -> None:
        pass


def measure(run_dir: Path, rounds: int, steps: int) -> dict[str, float]:
    """Returns the median time of a step in the loop and alone, and the median of the rounds' overheads."""
    import jax

    from gemma_jax.config import from_json, replace
    from gemma_jax.data.loader import prepare
    from gemma_jax.sharding import local_rows, make_mesh, put_batch
    from gemma_jax.tokenizer import Tokenizer
    from gemma_jax.training.goodput import Goodput
    from gemma_jax.training.loop import RunServices, Trainer
    from gemma_jax.training.metrics import RunLog
    from gemma_jax.training.objectives import pretraining
    from gemma_jax.training.stability import Stability
    from gemma_jax.training.state import create_train_state
    from gemma_jax.training.step import make_train_step

    config = from_json((run_dir / "config.json").read_text(), str(run_dir))
    config = replace(config, {"steps": (rounds + 1) * 2 * steps, "checkpoint.every": 2**30})
    mesh = make_mesh(config.mesh)
    dataset = prepare(config.data, Tokenizer.load(run_dir / "tokenizer.model"), config.seed)
    state, step = create_train_state(pretraining(config, mesh)), make_train_step(pretraining(config, mesh))
    size = config.data.batch_size
    one_batch = put_batch(dataset.train.batch(0, size), size, mesh)
    log = RunLog(run_dir, config.steps, 0)

    def alone() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, one_batch)
        jax.block_until_ready((state, metrics))

    def in_loop() -> None:
        nonlocal state
        until = replace(config, {"steps": int(state.step) + steps})
        with dataset.train.iterate(int(state.step) * size, size, local_rows(size, mesh)) as batches:
            stability, goodput = Stability(until.stability), Goodput(time.monotonic(), {})
            services = RunServices(NoCheckpoints(), log, stability, goodput)
            state = Trainer(until, mesh, step, batches, services).train(state)
        jax.block_until_ready(state)

    seconds: dict[str, list[float]] = {"loop": [], "alone": []}
    programs = {"loop": in_loop, "alone": alone}
    for number in range(rounds + 1):
        for name in sorted(programs, reverse=bool(number % 2)):
            start = time.perf_counter()
            programs[name]()
            if number:  # the first round compiles
                seconds[name].append((time.perf_counter() - start) / steps)
    log.close()
    shares = [a / b - 1 for a, b in zip(seconds["loop"], seconds["alone"], strict=True)]
    return {
        "milliseconds_in_loop": round(1e3 * statistics.median(seconds["loop"]), 2),
        "milliseconds_alone": round(1e3 * statistics.median(seconds["alone"]), 2),
        "overhead": round(statistics.median(shares), 4),
        "rounds": rounds,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        # One training step creates the tokenizer, the token cache and the demo's config.
        command = [sys.executable, "train.py", "pretrain", "demo", "--run_dir", str(run_dir)]
        once = ["--steps", "1", "--evaluation.every", "0", "--optimizer.warmup_steps", "1"]
        subprocess.run([*command, *once], cwd=REPOSITORY, check=True)
        print(json.dumps(measure(run_dir, arguments.rounds, arguments.steps)))


if __name__ == "__main__":
    main()
