"""Fine-tuning of the tiny run, on dialogues or preference pairs about its words."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.config import (
    CheckpointConfig,
    EvaluationConfig,
    ExampleDataConfig,
    FinetuneConfig,
    LoggingConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    replace,
    to_json,
)
from tests.tiny_run import WORDS


def write_dialogues(path: Path, count: int = 60) -> None:
    rng = np.random.default_rng(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked = [str(word) for word in rng.choice(WORDS[:-1], 2)]
            turns = [("user", " ".join(asked)), ("assistant", asked[0].upper())]
            if rng.random() < 0.3:
                turns *= 2
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")


def write_pairs(path: Path, count: int = 60) -> None:
    rng = np.random.default_rng(2)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, good, bad = (str(word) for word in rng.choice(WORDS[:-1], 3, replace=False))
            file.write(
                json.dumps({"prompt": prompt, "chosen": f"yes {good}", "rejected": f"no {bad}"}) + "\n"
            )


def config_file(folder: Path, base: Path, **changes: Any) -> str:
    """A file with a config of LoRA for 8 steps, with checkpoints and evaluations after 4 and 8."""
    pairs = changes.get("objective") == "dpo"
    data = folder / ("pairs.jsonl" if pairs else "dialogues.jsonl")
    (write_pairs if pairs else write_dialogues)(data)
    config = FinetuneConfig(
        run_dir=f"{folder}/run",
        init_from=str(base),
        steps=8,
        data=ExampleDataConfig(
            sources=(str(data),), sequence_length=64, batch_size=8, held_out=0.2, cache_dir=f"{folder}/cache"
        ),
        lora=LoraConfig(rank=4, alpha=8, dropout=0.1, embedding_rows=(106, 107)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        mesh=MeshConfig(cpu_devices=2),
        checkpoint=CheckpointConfig(every=4),
        evaluation=EvaluationConfig(every=4, rows=8),
        logging=LoggingConfig(every=1),
    )
    path = folder / "config.json"
    path.write_text(to_json(replace(config, changes)))
    return str(path)
