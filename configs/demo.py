"""A small Gemma for two CPU cores and a few minutes, trained on this machine's own Python sources."""

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
)

config = PretrainConfig(
    steps=600,
    model=PRESETS["gemma_small"],
    data=DataConfig(sources=("python-stdlib",), sequence_length=256, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    mesh=MeshConfig(cpu_devices=2),
    checkpoint=CheckpointConfig(every=200),
    evaluation=EvaluationConfig(every=100, rows=128),
)
