"""Pretrains the 7B shape on your own corpus and tokenizer. A starting point, not tuned for any machine."""

from gemma_jax.config import (
    PRESETS,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)

config = PretrainConfig(
    steps=100_000,
    model=PRESETS["gemma_7b"],
    tokenizer=TokenizerConfig(path="tokenizer.model"),
    data=DataConfig(sources=("corpus/*.jsonl",), sequence_length=8192, batch_size=512),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    compute=ComputeConfig(remat="full"),
    evaluation=EvaluationConfig(every=1000),
)
