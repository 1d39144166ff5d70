"""The tiny run that tests share: its corpus and its config. `tiny_run` in conftest.py trains it."""

from pathlib import Path

import numpy as np

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
    replace,
    to_json,
)

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron 日本".split()  # noqa: SIM905
STEPS = 8
# One document that stands out, and would take over a terminal.
ODD = "\x1b[31m QXJ ж☃ ZZZ\x07"


def write_corpus(folder: Path) -> None:
    """60 documents of 5 lines of random words, and the odd one."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(60):
        lines = [" ".join(rng.choice(WORDS, 16)) for _ in range(5)]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "odd.txt").write_text(ODD, encoding="utf-8")


def config(run: str, corpus: str, cache: str) -> PretrainConfig:
    """Returns a config of 8 steps, with checkpoints and evaluations after 4 and 8."""
    return PretrainConfig(
        run_dir=run,
        steps=STEPS,
        model=replace(PRESETS["gemma_tiny"], {"vocab_size": 430}),
        data=DataConfig(
            sources=(f"{corpus}/*.txt",), sequence_length=32, batch_size=8, held_out=0.2, cache_dir=cache
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        mesh=MeshConfig(cpu_devices=2),
        checkpoint=CheckpointConfig(every=4),
        evaluation=EvaluationConfig(every=4, rows=8),
        logging=LoggingConfig(every=1),
    )


def config_file(folder: Path, corpus: Path, **changes: object) -> str:
    """A file with that config, its run in `folder`, and the cache beside the corpus."""
    path = folder / "config.json"
    path.write_text(to_json(replace(config(f"{folder}/run", f"{corpus}", f"{corpus}/../cache"), changes)))
    return str(path)
