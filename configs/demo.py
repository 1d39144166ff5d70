"""A small Gemma for two CPU cores and a few minutes, trained on this machine's own Python sources."""

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
)

config = PretrainConfig(
    steps=420,
    model=PRESETS["gemma_small"],
    data=DataConfig(sources=("python-stdlib",), sequence_length=256, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50),
    # On two CPU cores, it is fastest to unroll all layers into one iteration and to compute the logits of
    # 32 x 8 positions at once.
    compute=ComputeConfig(scan_unroll=4, loss_block=32),
    mesh=MeshConfig(cpu_devices=2),
    checkpoint=CheckpointConfig(every=210),
    evaluation=EvaluationConfig(every=140, rows=128),
)
