"""Pretrains the 7B shape at 8192 tokens on 64 chips of TPU v5p: 1 trillion tokens."""

from gemma_jax.config import (
    PRESETS,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    PretrainConfig,
    TokenizerConfig,
)

# gemma plan pretrain_7b_v5p_128 --topology v5p-128
#   56.10 GiB a chip; 7.125 s a step,
#   5.918 of it without Pallas kernels;
#   modelled utilisation 57.0%;
#   9.98e+11 tokens in 39.3 days, 60,295 chip-hours
#   (libtpu 0.0.42.1, jax 0.10.2)
# Without this option, XLA replaces the all-gathers by loops of collective permutes; see docs/sharding.md.
NO_WINDOWED_EINSUM = ("xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",)

config = PretrainConfig(
    steps=476_000,
    model=PRESETS["gemma_7b"],
    tokenizer=TokenizerConfig(path="tokenizer.model"),
    data=DataConfig(sources=("corpus/*.jsonl",), sequence_length=8192, batch_size=256),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    compute=ComputeConfig(remat="projections", loss_vocab_block=10240, tpu_options=NO_WINDOWED_EINSUM),
    mesh=MeshConfig(fsdp=64),
    checkpoint=CheckpointConfig(every=1000),
    evaluation=EvaluationConfig(every=1000),
)
